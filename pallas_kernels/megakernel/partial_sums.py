"""Partial sums in device memory: what split-K CTAs store, and the sum over them.

    y = Σ_s y_partials[s] (+ y_partials[split_k], the product of B, of adapted linears)

While copies are in flight a CTA reads other CTAs' sums at no more than a cache line in some 14 cycles, so they are
shared out in tiles [WGMMA_M, WGMMA_N], each in one place, and of a batch of one the columns of eight partial sums are
one such tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import batched
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.all_reduce import AllReduce
from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.plan import ALL_REDUCED, Group, Plan
from pallas_kernels.megakernel.polling import is_whole, load_when_stored, mark_not_stored
from pallas_kernels.megakernel.register_tiles import add_all, column, load, over_columns, store
from pallas_kernels.megakernel.schedule import div, rem
from pallas_kernels.megakernel.sizes import WGMMA_M, WGMMA_N

PARTIALS_IN_REGISTERS = 32
"""Partial sums that are loaded into registers together."""


class PartialSums:
    """Partial sums of one group. `all_reduce`: over the devices whose y is added to this one's, or None. `polls`: partial
    sums are read as soon as they are stored (polling.py), with neither semaphores nor a batch of several rows; but y's of
    several devices have semaphores, and the head's, which are exchanged once and would have to be marked before."""

    def __init__(self, group: Group, plan: Plan, buffers: Buffers, all_reduce: AllReduce | None, *, polls: bool):
        self.group, self.plan, self.buffers, self.all_reduce = group, plan, buffers, all_reduce
        self.polls, self.polls_y = polls, polls and all_reduce is None and group is not plan.head
        self.turn = next(i for i, other in enumerate(plan.groups) if other is group)

    def columns_of(self, tile):
        """Parts of a partial sum [WGMMA_M, N] to store: its N-tiles, or its first column for a batch of one."""
        if self.plan.is_batch_one:
            return [column(tile, 0)]
        return [tile[:, start : start + WGMMA_N] for start in range(0, self.plan.padded_batch, WGMMA_N)]

    def store_t(self, number, where, columns):
        self._store(self._t_of(self.turn), number, where, columns)

    def store_y(self, number, where, columns):
        if self.all_reduce is None:
            self._store(self.buffers.y_partials, number, where, columns)
        else:
            self._store(self._y_of(self.all_reduce.device), number, where, columns, self.all_reduce.store)

    def sums_t(self, places: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Sums of the partial sums of A x at each ((adapted linear, rank tile), N-tile)."""
        parts = [self._parts(self._t_of(self.turn), self.group.a_partials, *place) for place in places]
        return self._sums(parts, poll=self.polls, forget=False)

    def sums_y(self, places: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
        """Sums of the partial sums of y, of all devices, at each ((tile, half), N-tile, adapted). `adapted`: the experts'
        product is one more partial sum."""
        sources = [self.buffers.y_partials]
        if self.all_reduce is not None:
            sources = [self._y_of(device) for device in range(self.all_reduce.num_devices)]
        parts = [[part for y in sources for part in self._parts(y, self.group.split_k, *place)] for place in places]
        return self._sums(parts, poll=self.polls_y, forget=True)

    def forget_t(self):
        """Mark the places of the partial sums of A x that the group before this one has polled."""
        before = self.turn - 1 if self.turn else len(self.plan.layer_groups) - 1
        if self.polls and self.plan.groups[before].adapted:
            mark_not_stored([self._t_of(before)], self.plan.num_ctas)

    def _t_of(self, turn: int):
        """The partial sums of A x of one of the plan's groups: they come in turn."""
        return self.buffers.t_partials.at[turn % self.plan.t_buffers]

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

    def _sums(self, places: list[list[tuple[Any, Any]]], *, poll: bool, forget: bool) -> list[Any]:
        """Σ of each place's parts, in fp32, an N-tile each."""
        refs, columns = zip(*(part for parts in places for part in parts), strict=True)
        tiles = iter(load_when_stored(refs, columns, forget=forget)) if poll else map(load, refs)
        return [self._sum(columns, tiles) for columns in ([count for _, count in parts] for parts in places)]

    def _sum(self, columns: list[Any], tiles: Iterator[Any]):
        """Σ of the next tiles, of each its first columns."""
        numbers = plgpu.broadcasted_iota(jnp.int32, (WGMMA_M, WGMMA_N), 1, layout=plgpu.Layout.WGMMA)
        total: Any = None
        for some in batched(columns, PARTIALS_IN_REGISTERS):
            loaded = [next(tiles) for _ in some]
            counted = [
                tile if is_whole(count) else jnp.where(numbers < count, tile, 0)
                for count, tile in zip(some, loaded, strict=True)
            ]
            total = add_all(counted if total is None else [total, *counted])
        return over_columns(total.sum(axis=1), (WGMMA_M, WGMMA_N)) if self.plan.is_batch_one else total
