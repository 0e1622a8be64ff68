"""Batches as a pure function of (seed, step), so that a resumed run sees the rows of an uninterrupted one.

One pool:  global row index i -> epoch i // n, row permutation(seed, epoch)[i % n].
Mixture:   blocks of 1000 indices hold weight_s / Σ weight of source s (largest remainder), shuffled by (seed, block);
           the c-th index of source s -> epoch c // n_s, row permutation(seed, epoch, s)[c % n_s].
Epochs:    N of them end after ⌈N · n⌉ rows, n those of all sources; what the last batch lacks then are rows of padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.packing import PackedRows, Rows

BLOCK = 1000


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "loss_mask", "segment_ids", "positions"], meta_fields=[]
)
@dataclass(frozen=True)
class Batch:
    """`Rows` of one optimiser step, A micro-batches of B rows; a pytree."""

    tokens: Int32[np.ndarray, "A B T"]
    loss_mask: Bool[np.ndarray, "A B T"]
    segment_ids: Int32[np.ndarray, "A B T"]
    positions: Int32[np.ndarray, "A B T"]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, source: int, size: int) -> Int[np.ndarray, " n"]:
    return _generator(0, seed, epoch, source).permutation(size)


@functools.lru_cache(maxsize=16)
def _block(seed: int, block: int, shares: tuple[int, ...]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The source of each index of a block, and how many of that source come before it in the block."""
    source = _generator(1, seed, block).permutation(np.repeat(np.arange(len(shares)), shares))
    before = np.empty(len(source), np.int64)
    for s, share in enumerate(shares):
        before[source == s] = np.arange(share)
    return source, before


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each data set in a block of 1000, in proportion to its weight. Raises UserError if one gets none."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    shares = np.floor(exact).astype(int)
    for s in np.argsort(-(exact - shares), kind="stable")[: BLOCK - shares.sum()]:
        shares[s] += 1
    if (shares == 0).any():
        s = int(np.argmin(shares))
        raise UserError(
            f"weight too small: dataset {s + 1}: {weights[s]} is less than 1 in {BLOCK} rows: raise it or leave it out"
        )
    return tuple(int(n) for n in shares)


def mixture_weights(weights: Sequence[float | None]) -> tuple[float, ...] | None:
    """The weights of data sets, or None if none is given. Raises UserError for weights given to some only, or as
    `shares_of`."""
    given = tuple(w for w in weights if w is not None)
    if not given:
        return None
    if len(given) < len(weights) or not all(w > 0 for w in given):
        raise UserError(f"weights: {list(weights)} for {len(weights)} dataset(s): give each a weight above 0, or none")
    shares_of(given)
    return given


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of a run over the rows of one or several sources, all padded to the same T when they are drawn.

    `weights` of None: one pool, every row once an epoch. Otherwise one weight a source, and each source walks its own
    epochs. A set smaller than a batch goes on with its next epoch.

    `epochs` of None: there is no last batch. Otherwise a row of one pool is drawn exactly `epochs` times over all batches
    (of 2.5 epochs: two times, and half of the rows a third time); of a mixture as many rows are drawn in all, by weight.
    Raises UserError for weights given to some sources only or below a thousandth; ValueError for sizes below 1."""

    rows: tuple[Rows | PackedRows, ...]
    seed: int
    batch_size: int
    grad_accum: int = 1
    weights: tuple[float | None, ...] | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        epochs = 1.0 if self.epochs is None else self.epochs
        if not self.rows or self.batch_size < 1 or self.grad_accum < 1 or self.seed < 0 or not 0 < epochs < math.inf:
            raise ValueError(
                f"{len(self.rows)=}, {self.batch_size=}, {self.grad_accum=}, {self.epochs=} must be positive, "
                f"{self.seed=} not negative"
            )
        weights = mixture_weights(self.weights or (None,) * len(self.rows))
        if weights is not None and len(weights) != len(self.rows):
            raise UserError(f"weights: {list(weights)} for {len(self.rows)} dataset(s): give each one, or none")
        object.__setattr__(self, "weights", weights)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.grad_accum

    @property
    def length(self) -> int:
        """T, that of the longest rows."""
        return max(rows.length for rows in self.rows)

    @property
    def max_segments(self) -> int:
        """Most segments of a row."""
        return max(rows.max_segments for rows in self.rows)

    @property
    def pools(self) -> list[tuple[Rows | PackedRows, ...]]:
        """The sources that are drawn from each in an order of its own: all as one, or with weights one by one."""
        return [self.rows] if self.weights is None else [(rows,) for rows in self.rows]

    @property
    def rows_per_epoch(self) -> int:
        """n, the rows of all sources."""
        return sum(len(rows) for rows in self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """The least number of steps that draws as many rows as there are."""
        return -(-self.rows_per_epoch // self.rows_per_step)

    @property
    def total_rows(self) -> int | None:
        """⌈epochs · n⌉, up to rounding errors of `epochs`; None without an end."""
        return None if self.epochs is None else max(1, math.ceil(round(self.epochs * self.rows_per_epoch, 6)))

    @property
    def total_steps(self) -> int | None:
        """The batches that hold `total_rows`, the last one partly; None without an end."""
        return None if self.total_rows is None else -(-self.total_rows // self.rows_per_step)

    def locate(self, index: Int[np.ndarray, " i"]) -> tuple[Int[np.ndarray, " i"], Int[np.ndarray, " i"]]:
        """(pool, row within the pool) of global row indices."""
        if self.weights is None:
            source, count = np.zeros_like(index), index
        else:
            shares = shares_of([w for w in self.weights if w is not None])
            found = [
                (_block(self.seed, b, shares), b, r)
                for b, r in zip(*(a.tolist() for a in divmod(index, BLOCK)), strict=True)
            ]
            source = np.asarray([order[r] for (order, _), _, r in found])
            count = np.asarray([b * shares[order[r]] + before[r] for (order, before), b, r in found])
        row = np.empty_like(index)
        for s, pool in enumerate(self.pools):
            size = sum(map(len, pool))
            epochs, within = divmod(count, size)
            for epoch in np.unique(epochs[source == s]).tolist():
                here = (source == s) & (epochs == epoch)
                row[here] = _permutation(self.seed, epoch, s, size)[within[here]]
        return source, row

    def at(self, step: int, rows: range | None = None) -> Batch:
        """The batch of optimiser step `step` (from 0): numpy arrays [grad_accum, batch_size, T], or only those `rows` of
        every micro-batch. Rows behind `total_rows` are padding: segment_ids 0 and no targets."""
        chosen = np.arange(self.batch_size)[slice(None) if rows is None else slice(rows.start, rows.stop)]
        index = np.arange(step * self.grad_accum, (step + 1) * self.grad_accum)[:, None] * self.batch_size + chosen
        slots = np.arange(index.size) if self.total_rows is None else np.flatnonzero(index.ravel() < self.total_rows)
        source, row = self.locate(index.ravel()[slots])
        names = [f.name for f in fields(Batch)]
        out = {name: np.zeros((index.size, self.length), bool if name == "loss_mask" else np.int32) for name in names}
        for s, pool in enumerate(self.pools):
            before = 0
            for part in pool:
                here = (source == s) & (row >= before) & (row < before + len(part))
                for name, array in part.arrays(row[here] - before, self.length, names).items():
                    out[name][slots[here]] = array
                before += len(part)
        return Batch(**{name: a.reshape(self.grad_accum, len(chosen), self.length) for name, a in out.items()})
