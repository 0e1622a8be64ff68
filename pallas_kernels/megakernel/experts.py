"""The experts' hidden activations between A x and B h.

    h_u = g_u · Σ_s t_partials[s],   t_partials[s] = A[e_u][:, slice s] x[slice s]

rounded, as the right operand of B. In a batch, reducer CTAs sum them and store them; a batch of one row sums what it
needs in every CTA: that is less than one exchange more.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.partial_sums import PartialSums
from pallas_kernels.megakernel.plan import Group, Plan
from pallas_kernels.megakernel.register_tiles import COLUMNS, load, over_rows, store_transposed
from pallas_kernels.megakernel.schedule import TileSchedule, div, div_rem
from pallas_kernels.megakernel.semaphores import GroupSemaphores
from pallas_kernels.megakernel.sizes import WGMMA_N, smem_rows


class ExpertHidden:
    """h of one group. `to_smem(source, start, rows, operand_smem, place)` copies rows of an activation into an
    operand."""

    def __init__(
        self,
        group: Group,
        plan: Plan,
        buffers: Buffers,
        schedule: TileSchedule,
        partial_sums: PartialSums,
        semaphores: GroupSemaphores,
        to_smem: Any,
    ):
        self.group, self.plan, self.buffers, self.schedule = group, plan, buffers, schedule
        self.partial_sums, self.semaphores, self.to_smem = partial_sums, semaphores, to_smem

    def reduce(self, layer):
        """Reduce this CTA's tiles of h and store them in device memory."""
        plan, buffers, group = self.plan, self.buffers, self.group
        first, number = self.schedule.h_share()

        def reduce_tile(n, _):
            tile, n_tile = div_rem(first + n * group.reducer_ctas, self.schedule.n_tiles)
            adapted_index, rank_tile = div_rem(tile, self.schedule.used_rank_tiles)
            row = (adapted_index * plan.max_rank_tiles + rank_tile) * plan.padded_batch + n_tile * WGMMA_N
            (h,) = self._tiles(adapted_index, [rank_tile], n_tile)
            store_transposed(buffers.h.at[pl.ds(row, WGMMA_N)], h)

        @pl.when(number > 0)
        def _():
            self.semaphores.wait_a_x(layer)
            lax.fori_loop(0, number, reduce_tile, None)
            self.semaphores.signal_h()

    def load(self, adapted_index, layer, operand_smem, first_rank_tile=None):
        """h of one linear as the right operand of B, after x; of its rank tiles a piece from `first_rank_tile` on, if that
        is given."""
        plan = self.plan

        def wait():
            self.semaphores.wait_h(layer, jnp.minimum(self.schedule.h_tiles, self.group.reducer_ctas))

        if first_rank_tile is None:
            wait()
        else:
            pl.when(first_rank_tile == 0)(wait)
        start = adapted_index * plan.max_rank_tiles * plan.padded_batch
        if first_rank_tile is not None:
            start += first_rank_tile * plan.padded_batch
        rows = smem_rows(plan.h_rank_tiles, plan.padded_batch)
        self.to_smem(self.buffers.h, start, rows, operand_smem, plan.x_smem_rows)

    def reduce_own(self, operand_smem):
        """For a batch of one, reduce h of each linear of which this CTA has tiles of B, and store it behind x."""

        def of_tile(n, _):
            _, _, adapted_index, number = self.schedule.b_tile(n)

            def reduce_pair(pair, _):
                rank_tiles = [jnp.minimum(2 * pair + i, number - 1) for i in (0, 1)]
                for tile, h in zip(rank_tiles, self._tiles(adapted_index, rank_tiles, 0), strict=True):
                    row = self.plan.x_smem_rows + (adapted_index * self.plan.max_rank_tiles + tile) * WGMMA_N
                    store_transposed(operand_smem.at[pl.ds(row, WGMMA_N)], h)

            lax.fori_loop(0, div(number + 1, 2), reduce_pair, None)

        lax.fori_loop(0, self.schedule.num_b, of_tile, None)
        plgpu.commit_smem()

    def _tiles(self, adapted_index, rank_tiles, n_tile):
        """Tiles [TILE_K, WGMMA_N] of h, in fp32."""
        experts = [div_rem(tile, self.plan.rank_tiles)[0] for tile in rank_tiles]
        gates = [load(self.buffers.gates.at[e, pl.ds(n_tile * WGMMA_N, WGMMA_N)], COLUMNS) for e in experts]
        sums = self.partial_sums.sums_t([((adapted_index, tile), n_tile) for tile in rank_tiles])
        return [t * over_rows(gate, t.shape) for t, gate in zip(sums, gates, strict=True)]
