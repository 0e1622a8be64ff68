"""The end of a group of linears: sum the partials, apply the norm's factor and the bias, and store what comes of it.

y = r · Σ_s y_partials[s] + bias        then, by group:

StoreHeads      q, k, v                    → q_raw, k_raw, v_new
AddResidual     x + m y, its squares       → x, x_weighted, square_sums     (with a norm of y: output_norm.py)
GatedProduct    act(gate) · up             → hidden
StoreLogits     y                          → logits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import batched
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.megakernel.activations import ACTIVATIONS
from pallas_kernels.megakernel.all_reduce import AllReduce
from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.partial_sums import PartialSums
from pallas_kernels.megakernel.plan import Group, Plan
from pallas_kernels.megakernel.register_tiles import (
    COLUMNS,
    ROWS,
    load,
    load_transposed,
    over_columns,
    over_rows,
    rounded,
    store,
    store_transposed,
)
from pallas_kernels.megakernel.schedule import TileSchedule, div, rem
from pallas_kernels.megakernel.semaphores import GroupSemaphores
from pallas_kernels.megakernel.sizes import TILE_K, TILE_M, WGMMA_M, WGMMA_N, stored_head_dim


class Store(Protocol):
    """Epilogue of a group: the use of its outputs."""

    def __call__(self, layer: Any, names: tuple[str, ...], row: Any, columns: Any) -> Callable[..., None]:
        """Load what is needed for `WGMMA_M` output rows and `WGMMA_N` columns of the linears `names`; return the function
        that takes their values [WGMMA_M, WGMMA_N] and stores the result."""
        ...


@dataclass(frozen=True)
class StoreHeads:
    """q and k by head, v where it stays."""

    buffers: Buffers
    head_dim: int

    def __call__(self, layer, names, row, columns):
        (name,), head, part = names, div(row, self.head_dim), rem(row, self.head_dim)
        if name == "v_proj":
            return partial(store_transposed, self.buffers.v_new.at[layer, columns, head, pl.ds(part, WGMMA_M)])
        raw = self.buffers.q_raw if name == "q_proj" else self.buffers.k_raw

        def put(value):
            for start in range(0, stored_head_dim(self.head_dim), self.head_dim):  # a head of TILE_K dimensions twice
                store_transposed(raw.at[head, columns, pl.ds(start + part, WGMMA_M)], value)

        return put


@dataclass(frozen=True)
class AddResidual:
    """x ← x + m y, and what the next group needs of its norm: x · weight and the sums of squares. `next_norm(layer)` is its
    number, `multiplier` m."""

    buffers: Buffers
    plan: Plan
    next_norm: Callable[[Any], Any]
    multiplier: float

    def __call__(self, layer, names, row, columns):
        buffers = self.buffers
        x_rows = k_tile_rows(self.plan, buffers.x, row, columns)
        x = load_transposed(x_rows).astype(jnp.float32)
        weight = load(buffers.norms.at[self.next_norm(layer), pl.ds(row, WGMMA_M)], ROWS).astype(jnp.float32)

        def put(value):
            y = rounded(value, buffers.x.dtype)
            if self.multiplier != 1:
                y = rounded(y * self.multiplier, buffers.x.dtype)
            after = rounded(x + y, buffers.x.dtype)
            store_transposed(x_rows, after)
            weighted_rows = k_tile_rows(self.plan, buffers.x_weighted, row, columns)
            store_transposed(weighted_rows, after * over_columns(weight, after.shape))
            store(buffers.square_sums.at[div(row, WGMMA_M), columns], (after * after).sum(axis=0))

        return put


@dataclass(frozen=True)
class GatedProduct:
    """act(gate) · up, the input of down_proj."""

    buffers: Buffers
    plan: Plan
    activation: str

    def __call__(self, layer, names, row, columns):
        hidden = self.buffers.hidden

        def put(gate, up):
            gate, up = rounded(gate, hidden.dtype), rounded(up, hidden.dtype)
            rows = k_tile_rows(self.plan, hidden, row, columns)
            store_transposed(rows, rounded(ACTIVATIONS[self.activation](gate), hidden.dtype) * up)

        return put


@dataclass(frozen=True)
class StoreLogits:
    """Logits, in fp32; where devices share the model, this one's `head_rows` of the vocabulary on all of them."""

    buffers: Buffers
    head_rows: int
    all_reduce: AllReduce | None

    def __call__(self, layer, names, row, columns):
        def put(value):
            logits, devices = self.buffers.logits, self.all_reduce
            if devices is None:
                store(logits.at[pl.ds(row, WGMMA_M), columns], value)
            else:
                devices.store(logits.at[pl.ds(devices.device * self.head_rows + row, WGMMA_M), columns], value)

        return put


def k_tile_rows(plan: Plan, ref, row, columns):
    """[WGMMA_N, WGMMA_M] of an activation in K-tiles."""
    return ref.at[pl.ds(div(row, TILE_K) * plan.padded_batch + columns.start, columns.size)]


class Epilogue:
    """Epilogue of the N-tiles that this CTA has of its CTA group's units. `has_norm`: the group's input has one."""

    def __init__(
        self,
        group: Group,
        buffers: Buffers,
        schedule: TileSchedule,
        partial_sums: PartialSums,
        semaphores: GroupSemaphores,
        store: Store,
        *,
        has_norm: bool,
    ):
        self.group, self.buffers, self.schedule, self.partial_sums = group, buffers, schedule, partial_sums
        self.semaphores, self.store, self.has_norm = semaphores, store, has_norm

    def run(self, layer):
        number, at = self.schedule.epilogue_share()
        lax.fori_loop(0, number, lambda n, _: self._finish(layer, n, at), None)

    def _finish(self, layer, n, at):
        unit, half, start = at(n)
        linear, tile = self.schedule.linear_of(unit, 0)
        group, buffers, shape = self.group, self.buffers, (WGMMA_M, WGMMA_N)
        n_tiles = [start + i for i in range(self.schedule.n_tiles_at_once)]
        columns = [pl.ds(i * WGMMA_N, WGMMA_N) for i in n_tiles]

        def row_of(names):
            return jnp.minimum(tile * TILE_M + half * WGMMA_M, group.outs[names[0]] - WGMMA_M)

        def start_stores(names):
            return [self.store(layer, names, row_of(names), some) for some in columns]

        first, *others = group.passes
        first_stores = None if others else start_stores(first)  # before the wait, if it is certain
        inverse_rms = buffers.inverse_rms
        r = [load(inverse_rms.at[self.schedule.cta, some], COLUMNS) for some in columns] if self.has_norm else []
        if not self.partial_sums.polls_y:
            pl.when(n == 0)(lambda: self.semaphores.wait_units(layer))
        places = [
            ((self.schedule.tile_number(linear + i, tile), half), n_tile, self.schedule.is_adapted(linear + i))
            for n_tile in n_tiles
            for i in range(group.width)
        ]
        values = [list(sums) for sums in batched(self.partial_sums.sums_y(places), group.width)]  # [N-tile][linear]
        if self.has_norm:
            values = [[y * over_rows(r_i, shape) for y in sums] for sums, r_i in zip(values, r, strict=True)]

        def finish(names):
            stores, rows = first_stores or start_stores(names), pl.ds(row_of(names), WGMMA_M)
            biases = {name: load(b.at[layer, rows], ROWS) for name, b in buffers.biases.items() if name in names}
            biases = {name: over_columns(b.astype(jnp.float32), shape) for name, b in biases.items()}
            for put, sums in zip(stores, values, strict=True):
                put(*(y + biases[name] if name in biases else y for name, y in zip(names, sums, strict=True)))

        for number, names in enumerate(group.passes):
            conditions = [linear == number * group.width] if others else []
            if group.outs[names[0]] % TILE_M:
                conditions.append(tile * TILE_M + half * WGMMA_M < group.outs[names[0]])
            do = partial(finish, names)
            pl.when(conditions[0] & conditions[-1])(do) if conditions else do()
