"""Packing of examples into rows of one length T: several examples a row, separated by segment ids.

first fit: an example goes into the oldest of at most `OPEN_ROWS` open rows that has room, else into a new row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import Encoded

OPEN_ROWS = 64
LENGTH_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """n rows of length T. segment_ids count 1, 2, ... within a row and are 0 on padding; positions restart at 0 in
    every segment; the first token of a segment is never a target, so nothing is predicted across examples."""

    tokens: Int32[np.ndarray, "n T"]
    loss_mask: Bool[np.ndarray, "n T"]
    segment_ids: Int32[np.ndarray, "n T"]
    positions: Int32[np.ndarray, "n T"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    def widen(self, length: int) -> Rows:
        """The same rows with padding up to T = `length` (at least the present one)."""
        if length < self.length:
            raise ValueError(f"{length=} is below the rows' {self.length}")
        pad = ((0, 0), (0, length - self.length))
        return Rows(*(np.pad(a, pad) for a in (self.tokens, self.loss_mask, self.segment_ids, self.positions)))


def _first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (row, free tokens), oldest first
    for i, length in enumerate(lengths):
        for slot, (row, free) in enumerate(open_rows):
            if length <= free:
                rows[row].append(i)
                open_rows[slot] = (row, free - length)
                break
        else:
            rows.append([i])
            open_rows.append((len(rows) - 1, max_length - length))
            if len(open_rows) > OPEN_ROWS:
                open_rows.remove(
                    min(open_rows, key=lambda entry: (entry[1], entry[0]))
                )  # the fullest has least to lose
    return rows


def pack(encoded: Sequence[Encoded], max_length: int, *, packing: bool = True) -> Rows:
    """Rows of length T <= max_length. With packing T = max_length; without, one example a row and T is the longest
    example rounded up to a multiple of 64 (at most max_length). Deterministic.

    Raises UserError for no examples at all, ValueError for an example longer than max_length."""
    if not encoded:
        raise UserError(f"no examples left: {max_length=}: every response was cut off: raise the maximum length")
    lengths = [len(e.tokens) for e in encoded]
    if max(lengths) > max_length:
        raise ValueError(f"an example has {max(lengths)} tokens, above {max_length=}: encode with the same length")
    if packing:
        plan, width = _first_fit(lengths, max_length), max_length
    else:
        plan = [[i] for i in range(len(encoded))]
        width = min(max_length, -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)

    shape = (len(plan), width)
    tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
    loss_mask = np.zeros(shape, bool)
    for row, members in enumerate(plan):
        at = 0
        for segment, i in enumerate(members, 1):
            span = slice(at, at + lengths[i])
            tokens[row, span] = encoded[i].tokens
            loss_mask[row, span] = encoded[i].loss_mask
            loss_mask[row, at] = False
            segment_ids[row, span] = segment
            positions[row, span] = np.arange(lengths[i])
            at += lengths[i]
    return Rows(tokens, loss_mask, segment_ids, positions)
