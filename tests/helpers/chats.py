"""Conversations, and their tokens and loss masks spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from data_fixtures import CHATML, write_tokenizer

from adafuse_jax.data.chat import encode_all, load_tokenizer
from adafuse_jax.data.examples import Message

S, U, A = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))
LONG = 10_000


def pieces(text: str) -> list[str]:
    """Byte tokens of ASCII text as ByteLevel spells them."""
    return ["Ċ" if c == "\n" else "Ġ" if c == " " else c for c in text]


def marked(*parts: tuple[str, bool]) -> tuple[list[str], list[bool]]:
    """Expected (tokens, mask) from (special token or text, is target) parts."""
    tokens: list[str] = []
    mask: list[bool] = []
    for part, target in parts:
        names = [part] if part in ("<s>", "</s>", "<|im_start|>", "<|im_end|>") else pieces(part)
        tokens += names
        mask += [target] * len(names)
    return tokens, mask


def encode(example, tokenizer, max_length):
    """The one row of an example, or None."""
    rows, dropped = encode_all([example], tokenizer, max_length)
    assert len(rows) + dropped == 1
    return rows[0] if rows else None


def tokens_and_mask(encoded, tokenizer) -> tuple[list[str], list[bool]]:
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss_mask.dtype == np.bool_
    return tokenizer.convert_ids_to_tokens(encoded.tokens.tolist()), encoded.loss_mask.tolist()


@pytest.fixture
def chatml(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tok", template=CHATML, eos="<|im_end|>"))


@pytest.fixture
def plain(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tok", adds_bos=True))


def split_texts(row, tokenizer) -> tuple[str, str]:
    """(text before the targets, text of the targets) of a row with one reply."""
    at = int(np.argmax(row.loss_mask))
    assert row.loss_mask[at:].all()
    return tokenizer.decode(row.tokens[:at]), tokenizer.decode(row.tokens[at:])
