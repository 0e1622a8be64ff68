"""A coarse class of every token of a vocabulary, by the text it stands for."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from jaxtyping import Int32

CLASSES = ("word, after a space", "letters, within a word", "digits", "punctuation", "white space", "special", "other")


def class_of(text: str) -> str:
    """Of a token that is not special."""
    bare = text.strip()
    if not bare:
        return "white space" if text else "other"
    if all(c.isdigit() for c in bare):
        return "digits"
    if all(c.isalpha() or c in "'’" for c in bare) and any(c.isalpha() for c in bare):
        return "word, after a space" if text[0].isspace() else "letters, within a word"
    if all(unicodedata.category(c)[0] in "PS" for c in bare) and "\ufffd" not in bare:
        return "punctuation"
    return "other"


def classes_of(tokenizer: Any, vocab_size: int) -> Int32[np.ndarray, " V"]:
    """The index in CLASSES of every token; ids beyond the tokenizer's are "other"."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    classes = np.full(vocab_size, CLASSES.index("other"), np.int32)
    count = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in range(count)], clean_up_tokenization_spaces=False)
    for i, text in enumerate(texts):
        classes[i] = CLASSES.index("special" if i in special else class_of(text))
    return classes
