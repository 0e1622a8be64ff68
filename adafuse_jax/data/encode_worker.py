"""The process that encodes chunks of examples: pickles on stdin, pickles on stdout, for the process that started it.

(tokenizer, max_length, date of templates)       first; no answer
[Example, …]  →  Chunk, or an error to raise     until stdin ends, also because the other process has ended
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import traceback

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import Chunk, encode_chunk
from adafuse_jax.data.templates import template_date


def main() -> None:
    given, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets among the answers
    tokenizer, max_length, date = pickle.load(given)
    gc.freeze()
    gc.disable()  # cycles would be looked for among all tokens; there are some where an example is refused
    with template_date(date):
        while True:
            try:
                examples = pickle.load(given)
            except EOFError:
                return
            try:
                answer: Chunk | Exception = encode_chunk(examples, tokenizer, max_length)
            except UserError as error:
                answer = error
            except Exception:
                answer = RuntimeError(traceback.format_exc())
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
            del examples, answer
            gc.collect()


if __name__ == "__main__":
    main()
