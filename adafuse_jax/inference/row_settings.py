"""Sampling and stop ids of the slots, as arrays on the device, and the variant of the programs that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import Sampling

NO_ROW: tuple[Sampling, tuple[int, ...]] = Sampling.of(), ()
"""Sampling and stop ids of a slot whose tokens nobody reads."""


class Variant(NamedTuple):
    """Settings that the programs of a step depend on: whether all rows are `greedy`, whether some have penalties or want
    log-probabilities, and the most stop ids, a power of two."""

    greedy: bool = True
    penalize: bool = False
    with_logprobs: bool = False
    stop_width: int = 1

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Variant:
        most = max(1, *(len(row.stop_ids) for row in rows))
        return cls(
            greedy=all(row.sampling.greedy for row in rows),
            penalize=any(row.sampling.penalize for row in rows),
            with_logprobs=any(row.wanted_logprobs is not None for row in rows),
            stop_width=1 << (most - 1).bit_length(),
        )

    def __or__(self, other: Variant) -> Variant:  # type: ignore[override]
        """The variant that serves the rows of both."""
        return Variant(
            greedy=self.greedy and other.greedy,
            penalize=self.penalize or other.penalize,
            with_logprobs=self.with_logprobs or other.with_logprobs,
            stop_width=max(self.stop_width, other.stop_width),
        )


class RowSettings:
    """The settings of the slots' rows. `variant` only grows while rows run, so that none is compiled because one ends."""

    def __init__(self, num_slots: int):
        self._num_slots, self.variant = num_slots, Variant()
        self._latest: tuple[Any, Any] = None, None

    def begin(self, rows: Sequence[Row], running: Sequence[Row]) -> None:
        """Rows begin, beside those that run."""
        variant = Variant.of(rows)
        self.variant = self.variant | variant if running else variant

    def of_slots(self, rows: Sequence[Row]) -> tuple[Sampling, Any]:
        """Sampling and stop ids of every slot, [B]; on the device, until other rows run."""
        by_slot = {row.slot: row for row in rows}
        wanted = tuple(by_slot.get(slot) for slot in range(self._num_slots))
        if (wanted, self.variant) != self._latest[0]:
            self._latest = (wanted, self.variant), jax.device_put(self.stacked(wanted))
        return self._latest[1]

    def stacked(self, rows: Sequence[Row | None]) -> tuple[Sampling, Any]:
        """Sampling [R] and stop ids [R, M], filled up with -1, which is no token; None: a slot whose tokens nobody reads. On
        the host: one program reads them."""
        settings = [NO_ROW if row is None else (row.sampling, row.stop_ids) for row in rows]
        samplings, stop_ids = zip(*settings, strict=True)
        variant = self.variant
        sampling = replace(Sampling.stack(samplings), greedy=variant.greedy, penalize=variant.penalize)
        filled = np.array([[*ids, *[-1] * (variant.stop_width - len(ids))] for ids in stop_ids], np.int32)
        return sampling, filled
