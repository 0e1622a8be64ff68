"""Packing of examples into rows of one length T: several examples a row, separated by segment ids.

first fit: an example goes into the oldest of at most `OPEN_ROWS` open rows that has room, else into a new row.

Packed rows hold their examples one behind the other, in memory or in memory-mapped files, and a plan: which examples are in
which row. Rows [T] are laid out when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

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

    @property
    def max_segments(self) -> int:
        """Most examples of a row."""
        return int(self.segment_ids.max(initial=1))

    def arrays(self, rows: Int[np.ndarray, " m"], length: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The named arrays of some rows, [m, length]: with padding up to `length` (at least T)."""
        pad = ((0, 0), (0, _padding(self.length, length)))
        return {name: np.pad(getattr(self, name)[rows], pad) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """n rows of length T, not laid out: example e has the tokens starts[e] to starts[e + 1] of N, row r the examples
    members[row_starts[r]] to members[row_starts[r + 1]], in this order."""

    tokens: Int32[np.ndarray, " N"]
    loss_mask: Bool[np.ndarray, " N"]
    starts: Int64[np.ndarray, " E1"]
    members: Int32[np.ndarray, " E"]
    row_starts: Int64[np.ndarray, " n1"]
    length: int
    """T."""

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def max_segments(self) -> int:
        """Most examples of a row."""
        return int(np.diff(self.row_starts).max(initial=1))

    def arrays(self, rows: Int[np.ndarray, " m"], length: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        """`Rows.arrays` of these rows."""
        _padding(self.length, length)
        num_segments = self.row_starts[rows + 1] - self.row_starts[rows]
        examples = self.members[_ranges(self.row_starts[rows], num_segments)]
        sizes = self.starts[examples + 1] - self.starts[examples]
        ends = np.cumsum(sizes)
        row_ends = np.concatenate([[0], ends])[np.cumsum(num_segments)]
        row_sizes = np.diff(row_ends, prepend=0)
        into = _ranges(length * np.arange(len(rows)), row_sizes)
        out = {}
        for name in names:
            out[name] = array = np.zeros((len(rows), length), bool if name == "loss_mask" else np.int32)
            flat = array.reshape(-1)
            if name == "segment_ids":
                flat[into] = np.repeat(_ranges(np.ones_like(num_segments), num_segments), sizes)
            elif name == "positions":
                flat[into] = _ranges(np.zeros_like(sizes), sizes)
            else:
                flat[into] = getattr(self, name)[_ranges(self.starts[examples], sizes)]
            if name == "loss_mask":
                flat[into[ends - sizes]] = False
        return out

    def rows(self) -> Rows:
        """All rows, laid out."""
        names = [field.name for field in fields(Rows)]
        return Rows(**self.arrays(np.arange(len(self)), self.length, names))


def _padding(length: int, wanted: int) -> int:
    if wanted < length:
        raise ValueError(f"length={wanted} is below the rows' {length}")
    return wanted - length


def _ranges(starts: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " N"]:
    """start, start + 1, … of each range, `size` numbers long, one behind the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


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


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The examples of each row (`PackedRows`), and the length T of rows."""

    members: Int32[np.ndarray, " E"]
    row_starts: Int64[np.ndarray, " n1"]
    length: int


def plan(lengths: Int[np.ndarray, " E"], max_length: int, *, packing: bool = True) -> Plan:
    """Rows of length T <= max_length for examples of these lengths. With packing T = max_length; without, one example a row
    and T is the longest example rounded up to a multiple of 64 (at most max_length). Deterministic.

    Raises UserError for no examples at all, ValueError for an example longer than max_length."""
    if not len(lengths):
        raise UserError(f"no examples left: {max_length=}: every response was cut off: raise the maximum length")
    longest = int(lengths.max())
    if longest > max_length:
        raise ValueError(f"an example has {longest} tokens, above {max_length=}: encode with the same length")
    if not packing:
        width = min(max_length, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        return Plan(np.arange(len(lengths), dtype=np.int32), np.arange(len(lengths) + 1), width)
    rows = _first_fit(lengths.tolist(), max_length)
    members = np.fromiter(chain.from_iterable(rows), np.int32, len(lengths))
    return Plan(members, _starts([len(row) for row in rows]), max_length)


def _starts(sizes: Sequence[int] | Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n1"]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def pack(encoded: Sequence[Encoded], max_length: int, *, packing: bool = True) -> Rows:
    """Rows of the examples by `plan`, which raises."""
    lengths = np.asarray([len(e.tokens) for e in encoded], np.int64)
    planned = plan(lengths, max_length, packing=packing)
    return PackedRows(
        tokens=np.concatenate([e.tokens for e in encoded]),
        loss_mask=np.concatenate([e.loss_mask for e in encoded]),
        starts=_starts(lengths),
        members=planned.members,
        row_starts=planned.row_starts,
        length=planned.length,
    ).rows()
