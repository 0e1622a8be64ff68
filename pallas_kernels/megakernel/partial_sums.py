"""Partial sums in device memory: what split-K CTAs store, and the sum over them.

    y = Σ_s y_partials[s] (+ y_partials[split_k], the product of B, of adapted linears)

While copies are in flight a CTA reads other CTAs' sums at no more than a cache line in some 14 cycles, so they are
shared out in tiles [WGMMA_M, WGMMA_N], each in one place, and of a batch of one the columns of eight partial sums are
one such tile."""

from __future__ import annotations

from itertools import batched
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.all_reduce import AllReduce
from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.plan import ALL_REDUCED, WGMMA_M, WGMMA_N, Group, Plan
from pallas_kernels.megakernel.register_tiles import add_all, column, load, over_columns, store
from pallas_kernels.megakernel.schedule import div, rem

PARTIALS_IN_REGISTERS = 32
"""Partial sums that are loaded into registers together."""


class PartialSums:
    """Partial sums of one group. `all_reduce`: over the devices whose y is added to this one's, or None."""

    def __init__(self, group: Group, plan: Plan, buffers: Buffers, all_reduce: AllReduce | None):
        self.group, self.plan, self.buffers, self.all_reduce = group, plan, buffers, all_reduce

    def columns_of(self, tile):
        """Parts of a partial sum [WGMMA_M, N] to store: its N-tiles, or its first column for a batch of one."""
        if self.plan.is_batch_one:
            return [column(tile, 0)]
        return [tile[:, start : start + WGMMA_N] for start in range(0, self.plan.padded_batch, WGMMA_N)]

    def store_t(self, number, where, columns):
        self._store(self.buffers.t_partials, number, where, columns)

    def store_y(self, number, where, columns):
        if self.all_reduce is None:
            self._store(self.buffers.y_partials, number, where, columns)
        else:
            self._store(self._y_of(self.all_reduce.device), number, where, columns, self.all_reduce.store)

    def sum_t(self, where, n_tile):
        return self._sum(self.buffers.t_partials, self.group.a_partials, where, n_tile)

    def sum_y(self, where, n_tile, adapted):
        """Sum of the partial sums of y, of all devices. `adapted`: the experts' product is one more partial sum."""
        split_k = self.group.split_k
        if self.all_reduce is None:
            return self._sum(self.buffers.y_partials, split_k, where, n_tile, one_more=adapted)
        devices = range(self.all_reduce.num_devices)
        return add_all([self._sum(self._y_of(d), split_k, where, n_tile, one_more=adapted) for d in devices])

    def _y_of(self, device):
        """The partial sums of y that a device has stored."""
        (linear,) = self.group.outs
        return self.buffers.device_partials.at[ALL_REDUCED.index(linear), device]

    def _store(self, partials_gmem, number, where, columns, put=store):
        for i, values in enumerate(columns):
            if self.plan.is_batch_one:
                put(partials_gmem.at[div(number, WGMMA_N), *where, 0, :, rem(number, WGMMA_N)], values)
            else:
                put(partials_gmem.at[number, *where, i], values)

    def _sum(self, partials_gmem, number: int, where, n_tile, one_more: Any = False):
        """Σ of the first `number` partial sums, and of `one_more`; one N-tile, in fp32."""
        if not self.plan.is_batch_one:
            groups = batched(range(number), PARTIALS_IN_REGISTERS)
            total = add_all(add_all(load(partials_gmem.at[s, *where, n_tile]) for s in some) for some in groups)
            if one_more is False:
                return total
            return total + jnp.where(one_more, load(partials_gmem.at[number, *where, n_tile]), 0)
        total, least, most = 0.0, number + (one_more is True), number + (one_more is not False)
        for start in range(0, most, WGMMA_N):
            tile = load(partials_gmem.at[start // WGMMA_N, *where, 0])
            if start + WGMMA_N > least:
                numbers = plgpu.broadcasted_iota(jnp.int32, tile.shape, 1, layout=plgpu.Layout.WGMMA) + start
                tile = jnp.where(numbers < number + jnp.where(one_more, 1, 0), tile, 0)
            total += tile
        return over_columns(total.sum(axis=1), (WGMMA_M, WGMMA_N))
