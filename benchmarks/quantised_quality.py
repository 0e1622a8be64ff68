"""Perplexity of a model on a text, plain and quantised, beside a reference in torch of the same scheme.

    python -m benchmarks.quantised_quality --model DIR --text docs/*.md --tokens 8192 --out tokens.json
    TORCH_PYTHON -m benchmarks.peers.quantised_perplexity --model DIR --tokens tokens.json --bits 4 --group-size 64

The text is cut into rows of `--length` tokens, each scored from its second token on; float32, in both programs. `--out` gets
the tokens for the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.core import runtime
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.loss import token_losses
from adafuse_jax.models.quantised import LAYOUTS, uneven_groups


def rows_of(tokens: Sequence[int], length: int, count: int) -> np.ndarray:
    """[rows, length] of the first `count` tokens."""
    rows = min(count, len(tokens)) // length
    return np.asarray(tokens[: rows * length], np.int32).reshape(rows, length)


@jax.jit
def loss_of(model: Backbone, row: jax.Array) -> jax.Array:
    """Σ −log p of a row's tokens but the first."""
    return token_losses(model, model.run(row[None]).hidden, row[None], jnp.ones((1, len(row)), bool)).sum()


def perplexity(model: Backbone, rows: np.ndarray) -> float:
    total = sum(float(loss_of(model, jnp.asarray(row))) for row in rows)
    return math.exp(total / (rows.size - len(rows)))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="at most")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, help="JSON of the rows")
    arguments = parser.parse_args(argv)
    runtime.exact_float32()
    checkpoint = HFCheckpoint.open(arguments.model)
    text = "\n".join(path.read_text(encoding="utf-8") for path in arguments.text)
    tokens = load_tokenizer(checkpoint.directory)(text)["input_ids"]
    rows = rows_of(tokens, arguments.length, arguments.tokens)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows.tolist()))
    print(f"{arguments.model}: {rows.size} tokens in {len(rows)} rows", flush=True)
    plain = None
    for name in (None, *LAYOUTS):
        if name is not None and (reason := uneven_groups(checkpoint.config, LAYOUTS[name])):
            print(f"{name}: {reason}", flush=True)
            continue
        found = perplexity(load_backbone(checkpoint, "float32", quantize=name), rows)
        plain = plain or found
        print(f"{name or 'plain'}: {found:.4f} ({100 * (found / plain - 1):+.2f}%)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
