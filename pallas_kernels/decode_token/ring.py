"""Weights on their way: a ring of chunks in shared memory, which one warpgroup fills and another empties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.plan import HALF, QUIET, rem


class Filled(NamedTuple):
    """What the copying warpgroup has done: copies begun, those of them that it has seen land, and where its phase began."""

    count: Any
    landed: Any
    start: Any

    def begin(self) -> Filled:
        """A new phase begins here."""
        return self._replace(start=self.count)


class Ring:
    """Chunks of weights, as large as a slot, on their way from device memory to the tensor cores. One
    warpgroup fills the slots and one empties them; both go through the same chunks in the same order, and each keeps a
    count of those it has passed.

    A chunk may come in two halves from two places, each with a barrier of its own, `full` and `other_full`: each would
    complete one that waits for one arrival. A phase's first chunks come while the blocks exchange what they have
    found, and whatever they store or load meanwhile waits behind copies under way; so of as many as the ring holds, no more
    than `quiet` are under way at once."""

    def __init__(self, slots_smem: Any, full: Any, empty: Any, other_full: Any = None, quiet: int = QUIET):
        self.slots_smem, self.full, self.empty, self.other_full = slots_smem, full, empty, other_full
        self.num_slots = slots_smem.shape[0]
        self.quiet = min(quiet, self.num_slots)

    def start(self) -> Filled:
        """Nothing, and no exchange to keep quiet for."""
        return Filled(jnp.int32(0), jnp.int32(0), jnp.int32(-self.num_slots))

    def fill(
        self,
        filled: Filled,
        number: Any,
        sources_of: Callable[[Any], tuple[Sequence[Any], Any]],
        when_full: Callable[[], None] | None = None,
    ) -> Filled:
        """With the next `number` chunks. `sources_of(c)` gives, of the c-th, sources and which of them it is; a source gives
        the chunk, or its two halves. `when_full` is done when the phase has filled the ring once. Each time round either
        one copy has landed or one more begins: a loop of its own for waiting would be unrolled, and be a tenth of the
        kernel's instructions."""
        begin = filled.count

        def must_land(filled):
            in_flight = jnp.where(filled.count - filled.start < self.num_slots, self.quiet, self.num_slots)
            return filled.landed < filled.count + 1 - in_flight

        def wait(filled):
            plgpu.barrier_wait(self.full.at[rem(filled.landed, self.num_slots)])
            return filled._replace(landed=filled.landed + 1)

        def copy(filled):
            slot = rem(filled.count, self.num_slots)
            if when_full is not None:
                pl.when(filled.count - filled.start == self.num_slots)(when_full)

            @pl.when(filled.count >= self.num_slots)
            def _():
                plgpu.barrier_wait(self.empty.at[slot])

            def of(source):
                parts = source()
                for number, (part_gmem, barriers) in enumerate(zip(parts, (self.full, self.other_full), strict=False)):
                    part_smem = self.slots_smem.at[slot]
                    if len(parts) > 1:
                        part_smem = self.slots_smem.at[slot, pl.ds(number * HALF, HALF)]
                    plgpu.copy_gmem_to_smem(part_gmem, part_smem, barriers.at[slot])

            sources, which = sources_of(filled.count - begin)
            for number, source in enumerate(sources):
                pl.when(which == number)(partial(of, source)) if len(sources) > 1 else of(source)
            return filled._replace(count=filled.count + 1)

        return lax.while_loop(
            lambda filled: filled.count < begin + number,
            lambda filled: lax.cond(must_land(filled), wait, copy, filled),
            filled,
        )

    def take(self, count, in_halves: Any = False):
        """The next chunk, when it has come."""
        slot = rem(count, self.num_slots)
        plgpu.barrier_wait(self.full.at[slot])
        if in_halves is not False:
            pl.when(in_halves)(lambda: plgpu.barrier_wait(self.other_full.at[slot]))
        return self.slots_smem.at[slot]

    def release(self, count):
        plgpu.barrier_arrive(self.empty.at[rem(count, self.num_slots)])
