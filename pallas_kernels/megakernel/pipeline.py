"""Multi-stage shared-memory pipeline: one warpgroup produces chunks of weights, another consumes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.plan import COPIES_DURING_EXCHANGE
from pallas_kernels.megakernel.schedule import rem
from pallas_kernels.megakernel.sizes import TILE_M, WGMMA_M


class ProducerState(NamedTuple):
    """State of the producer warpgroup: copies it has issued, those it has seen complete, and those it had issued when the
    phase began."""

    count: Any
    landed: Any
    start: Any

    def begin(self) -> ProducerState:
        """A new phase begins here."""
        return self._replace(start=self.count)


class CodesAndScales(NamedTuple):
    """A chunk of quantised weights: codes [TILE_M, bytes] and scales [groups, TILE_M]."""

    codes: Any
    scales: Any


class Pipeline:
    """Chunks of weights, each as large as a stage at most, on their way from device memory to the tensor cores. The producer
    warpgroup fills the stages and the consumer empties them; both go through the same chunks in the same order, and each
    counts those it has passed.

    A chunk may come from two places, in two halves or as codes and scales, each with a barrier of its own, `full` and
    `second_half_full`: each would complete one that waits for one arrival. Codes are in `codes_smem`, which takes the same
    place as `stages_smem`, and their scales in `scales_smem`.

    A phase's first chunks come while the CTAs exchange partial sums, and whatever they store or load meanwhile waits behind
    copies in flight; so of the first `num_stages` of a phase no more than `copies_during_exchange` are in flight at once."""

    def __init__(
        self,
        stages_smem: Any,
        full: Any,
        empty: Any,
        second_half_full: Any = None,
        copies_during_exchange: int = COPIES_DURING_EXCHANGE,
        codes_smem: Any = None,
        scales_smem: Any = None,
    ):
        self.stages_smem, self.full, self.empty, self.second_half_full = stages_smem, full, empty, second_half_full
        self.codes_smem, self.scales_smem, self.num_stages = codes_smem, scales_smem, stages_smem.shape[0]
        self.copies_during_exchange = min(copies_during_exchange, self.num_stages)

    def start(self) -> ProducerState:
        """No copies, and no exchange to keep quiet for."""
        return ProducerState(jnp.int32(0), jnp.int32(0), jnp.int32(-self.num_stages))

    def produce(
        self, state: ProducerState, number: Any, sources_of: Callable[[Any], tuple[Sequence[Any], Any]]
    ) -> ProducerState:
        """Fill stages with the next `number` chunks. `sources_of(c)` gives, of the c-th, sources and the index of the
        right one; a source gives the chunk, its two halves, or `CodesAndScales`. Each time round either one copy has
        landed or one more begins: a loop of its own for waiting would be unrolled, and be a tenth of the kernel's
        instructions."""
        begin = state.count

        def must_land(state):
            during_exchange = state.count - state.start < self.num_stages
            in_flight = jnp.where(during_exchange, self.copies_during_exchange, self.num_stages)
            return state.landed < state.count + 1 - in_flight

        def wait(state):
            plgpu.barrier_wait(self.full.at[rem(state.landed, self.num_stages)])
            return state._replace(landed=state.landed + 1)

        def copy(state):
            stage = rem(state.count, self.num_stages)

            @pl.when(state.count >= self.num_stages)
            def _():
                plgpu.barrier_wait(self.empty.at[stage])

            def copy_from(source):
                parts: Sequence[Any] = source()
                places: Sequence[Any] = [self.stages_smem.at[stage]]
                if isinstance(parts, CodesAndScales):
                    places = self._codes_and_scales(stage)
                elif len(parts) > 1:
                    places = [self.stages_smem.at[stage, pl.ds(half * WGMMA_M, WGMMA_M)] for half in (0, 1)]
                for part_gmem, part_smem, barriers in zip(
                    parts, places, (self.full, self.second_half_full), strict=False
                ):
                    plgpu.copy_gmem_to_smem(part_gmem, part_smem, barriers.at[stage])

            sources, index = sources_of(state.count - begin)
            for i, source in enumerate(sources):
                pl.when(index == i)(partial(copy_from, source)) if len(sources) > 1 else copy_from(source)
            return state._replace(count=state.count + 1)

        return lax.while_loop(
            lambda state: state.count < begin + number,
            lambda state: lax.cond(must_land(state), wait, copy, state),
            state,
        )

    def take(self, count, in_halves: Any = False):
        """The next chunk, when it has come."""
        stage = rem(count, self.num_stages)
        plgpu.barrier_wait(self.full.at[stage])
        if in_halves is True:
            plgpu.barrier_wait(self.second_half_full.at[stage])
        elif in_halves is not False:
            pl.when(in_halves)(lambda: plgpu.barrier_wait(self.second_half_full.at[stage]))
        return self.stages_smem.at[stage]

    def take_codes(self, count) -> CodesAndScales:
        """The next chunk, of quantised weights, when it has come."""
        self.take(count, True)
        return self._codes_and_scales(rem(count, self.num_stages))

    def _codes_and_scales(self, stage) -> CodesAndScales:
        return CodesAndScales(self.codes_smem.at[stage, pl.ds(0, TILE_M)], self.scales_smem.at[stage])

    def release(self, count):
        plgpu.barrier_arrive(self.empty.at[rem(count, self.num_stages)])
