"""Partial sums in device memory: what split-K CTAs store, and the sum over them.

    y = Σ_s y_partials[s] (+ y_partials[split_k], the product of B, of adapted linears)

While copies are in flight a CTA reads other CTAs' sums at no more than a cache line in some 14 cycles, so they are
shared out in tiles [WGMMA_M, WGMMA_N], each in one place, and of a batch of one the columns of eight partial sums are
one such tile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched, islice
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.all_reduce import AllReduce
from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.plan import ALL_REDUCED, WGMMA_M, WGMMA_N, Group, Plan
from pallas_kernels.megakernel.polling import load_when_stored
from pallas_kernels.megakernel.register_tiles import add_all, column, load, over_columns, store
from pallas_kernels.megakernel.schedule import div, rem

PARTIALS_IN_REGISTERS = 32
"""Partial sums that are loaded into registers together."""


class PartialSums:
    """Partial sums of one group. `all_reduce`: over the devices whose y is added to this one's, or None. `polls`: y's are
    read as soon as they are stored (polling.py), and the group has no semaphores for them."""

    def __init__(self, group: Group, plan: Plan, buffers: Buffers, all_reduce: AllReduce | None, *, polls: bool):
        self.group, self.plan, self.buffers, self.all_reduce, self.polls = group, plan, buffers, all_reduce, polls

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
        parts = self._parts(self.buffers.t_partials, self.group.a_partials, where, n_tile)
        return self._sum(parts, [load(ref) for ref, _ in parts])

    def sums_y(self, places: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
        """Sums of the partial sums of y, of all devices, at each (tile and half, N-tile, adapted): all of them are loading
        at once. `adapted`: the experts' product is one more partial sum."""
        sources = [self.buffers.y_partials]
        if self.all_reduce is not None:
            sources = [self._y_of(device) for device in range(self.all_reduce.num_devices)]
        places_parts = [
            [part for y in sources for part in self._parts(y, self.group.split_k, *place)] for place in places
        ]
        flat = [part for parts in places_parts for part in parts]
        tiles = iter(load_when_stored(*zip(*flat, strict=True)) if self.polls else [load(ref) for ref, _ in flat])
        return [self._sum(parts, list(islice(tiles, len(parts)))) for parts in places_parts]

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

    def _parts(self, partials_gmem, number: int, where, n_tile, one_more: Any = False) -> list[tuple[Any, Any]]:
        """Tiles [WGMMA_M, WGMMA_N] that hold the first `number` partial sums of one N-tile, and `one_more`, each with the
        number of its columns that count."""
        if not self.plan.is_batch_one:
            parts: list[tuple[Any, Any]] = [(partials_gmem.at[s, *where, n_tile], WGMMA_N) for s in range(number)]
            if one_more is not False:
                columns = WGMMA_N if one_more is True else jnp.where(one_more, WGMMA_N, 0)
                parts.append((partials_gmem.at[number, *where, n_tile], columns))
            return parts
        counts = number + one_more if isinstance(one_more, bool) else number + jnp.where(one_more, 1, 0)
        return [
            (partials_gmem.at[start // WGMMA_N, *where, 0], counts - start)
            for start in range(0, number + (one_more is not False), WGMMA_N)
        ]

    def _sum(self, parts, tiles):
        """Σ of the parts, which have been loaded into `tiles`; one N-tile, in fp32."""
        numbers = plgpu.broadcasted_iota(jnp.int32, (WGMMA_M, WGMMA_N), 1, layout=plgpu.Layout.WGMMA)
        counted = [
            tile if isinstance(columns, int) and columns >= WGMMA_N else jnp.where(numbers < columns, tile, 0)
            for (_, columns), tile in zip(parts, tiles, strict=True)
        ]
        total = add_all(add_all(some) for some in batched(counted, PARTIALS_IN_REGISTERS))
        return over_columns(total.sum(axis=1), (WGMMA_M, WGMMA_N)) if self.plan.is_batch_one else total
