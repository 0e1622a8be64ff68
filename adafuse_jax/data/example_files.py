"""Encoded examples in files, written as they come and read as memory maps.

tokens.int32        the tokens of all examples, one behind the other [N]
loss_mask.bool      the same for their masks [N]
starts.int64        where each example starts, and N [E + 1]
members.int32       `Plan` of packed rows, if there is one [E]
row_starts.int64    [n + 1]
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy.typing import DTypeLike

from adafuse_jax.data.chat import Chunk, Encoded
from adafuse_jax.data.packing import PackedRows, Plan


def write_examples(directory: Path, chunks: Iterable[Chunk]) -> Int64[np.ndarray, " E"]:
    """Write the rows of all chunks into a new directory; returns their lengths. Raises OSError."""
    directory.mkdir()
    lengths = [np.zeros(0, np.int64)]
    with (directory / "tokens.int32").open("wb") as tokens, (directory / "loss_mask.bool").open("wb") as masks:
        for chunk in chunks:
            tokens.write(_bytes(chunk.tokens, np.int32))
            masks.write(_bytes(chunk.loss_mask, np.bool_))
            lengths.append(chunk.lengths)
    found = np.concatenate(lengths)
    starts = np.concatenate([[0], np.cumsum(found)])
    for name, size in (("tokens.int32", 4), ("loss_mask.bool", 1)):
        if (directory / name).stat().st_size != size * starts[-1]:
            raise OSError(errno.EIO, f"{name} has other bytes than were written")
    (directory / "starts.int64").write_bytes(_bytes(starts, np.int64))
    return found


def write_plan(directory: Path, plan: Plan) -> None:
    """Add a plan to `write_examples`. Raises OSError."""
    (directory / "members.int32").write_bytes(_bytes(plan.members, np.int32))
    (directory / "row_starts.int64").write_bytes(_bytes(plan.row_starts, np.int64))


def _bytes(array: np.ndarray, dtype: DTypeLike) -> memoryview:
    """The bytes that a file gets. `ndarray.tofile` is not used: on a full disk it loses bytes without an error."""
    return np.ascontiguousarray(array, dtype).data


def read_examples(directory: Path) -> list[Encoded]:
    """The examples, as views of memory maps. Raises OSError."""
    tokens, mask, starts = (_array(directory / name) for name in ("tokens.int32", "loss_mask.bool", "starts.int64"))
    return [Encoded(tokens[a:b], mask[a:b]) for a, b in pairwise(starts.tolist())]


def read_rows(directory: Path, length: int) -> PackedRows:
    """The packed rows, of this length, as memory maps. Raises OSError."""
    return PackedRows(
        tokens=_array(directory / "tokens.int32"),
        loss_mask=_array(directory / "loss_mask.bool"),
        starts=_array(directory / "starts.int64"),
        members=_array(directory / "members.int32"),
        row_starts=_array(directory / "row_starts.int64"),
        length=length,
    )


def _array(path: Path) -> np.ndarray:
    dtype = np.dtype(path.suffix[1:])
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
