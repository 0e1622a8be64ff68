"""Texts to token ids and where each token starts, in memory that a long text does not multiply.

A tokenizer needs about 150 bytes a character. Texts go to it a megabyte at a time, and longer ones window by window: windows
overlap, and the tokens go over from one to the next in the middle of the overlap, at a place where `AGREEING` tokens are
the same in both. So the ends of windows, where tokens may differ from those of the whole text, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from adafuse_jax.core.errors import UserError

SPACE_MARKERS = ("Ġ", "Ċ", "▁")
BATCH_CHARACTERS = 2**20
WINDOW = 2**18
OVERLAP = 2**12
AGREEING = 16

Tokens = tuple[Int32[np.ndarray, " T"], Int64[np.ndarray, " T"]]
"""Token ids, and the character at which each starts."""


def tokens_and_starts(texts: Sequence[str], tokenizer: Any) -> Iterator[Tokens]:
    """The tokens of each text, without special tokens that the text does not hold itself."""
    short: list[str] = []
    for text in texts:
        if len(text) <= BATCH_CHARACTERS:
            short.append(text)
            continue
        yield from _batches(short, tokenizer)
        yield _by_windows(text, tokenizer)
        short = []
    yield from _batches(short, tokenizer)


def _batches(texts: Sequence[str], tokenizer: Any) -> Iterator[Tokens]:
    """The tokenizer called for at most `BATCH_CHARACTERS` at a time, or for one text."""
    first = 0
    while first < len(texts):
        stop, characters = first + 1, len(texts[first])
        while stop < len(texts) and characters + len(texts[stop]) <= BATCH_CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        yield from _at_once(texts[first:stop], tokenizer)
        first = stop


def _at_once(texts: Sequence[str], tokenizer: Any) -> Iterator[Tokens]:
    tokenizer("", add_special_tokens=False)  # sets truncation, padding and special tokens of the Rust tokenizer
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids = np.asarray(encoding.ids, np.int64)
        if len(ids) and ids.max() >= 2**31:
            raise UserError(
                f"the tokenizer has a token with id {ids.max()}, which no model has; restore tokenizer.json"
            )
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
        yield ids.astype(np.int32), _starts(ids, offsets, tokenizer)


def _starts(ids: Int64[np.ndarray, " T"], offsets: Int64[np.ndarray, "T 2"], tokenizer: Any) -> Int64[np.ndarray, " T"]:
    """Character offset at which each token starts in the text. A space that a byte-level tokenizer trims from its offsets
    counts as part of the token that holds it, for it may straddle a boundary."""
    starts = offsets[:, 0].copy()
    ended = np.concatenate([[0], np.maximum.accumulate(offsets[:, 1])[:-1]]) if len(starts) else starts
    for gap in np.nonzero(starts > ended)[0]:
        if (tokenizer.convert_ids_to_tokens(int(ids[gap])) or "").startswith(SPACE_MARKERS):
            starts[gap] = ended[gap]
    return starts


def _by_windows(text: str, tokenizer: Any) -> Tokens:
    window, overlap = WINDOW, OVERLAP
    while window < len(text):
        found = _stitched(text, tokenizer, window, overlap)
        if found is not None:
            return found
        window, overlap = 4 * window, 4 * overlap  # a stretch of text in which no token boundary is sure
    return next(_at_once([text], tokenizer))


def _stitched(text: str, tokenizer: Any, window: int, overlap: int) -> Tokens | None:
    """None if the tokens of two windows nowhere agree in their overlap."""
    parts: list[Tokens] = []
    windows = range(0, max(1, len(text) - overlap), window - overlap)
    for at, (ids, starts) in zip(windows, _batches([text[at : at + window] for at in windows], tokenizer), strict=True):
        starts += at
        if parts:
            seam = _seam(parts[-1], (ids, starts), at + overlap // 2)
            if seam is None:
                return None
            before, after = seam
            parts[-1] = (parts[-1][0][:before], parts[-1][1][:before])
            ids, starts = ids[after:], starts[after:]
        parts.append((ids, starts))
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([starts for _, starts in parts])


def _seam(left: Tokens, right: Tokens, middle: int) -> tuple[int, int] | None:
    """The first places, from character `middle` on, in the tokens of two windows from which `AGREEING` tokens agree."""
    for after in range(int(np.searchsorted(right[1], middle)), len(right[0]) - AGREEING):
        before = int(np.searchsorted(left[1], right[1][after]))
        if before + AGREEING > len(left[0]):
            return None
        if all(
            (x[before : before + AGREEING] == y[after : after + AGREEING]).all()
            for x, y in zip(left, right, strict=True)
        ):
            return before, after
    return None
