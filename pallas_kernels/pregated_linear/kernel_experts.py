"""The experts' part of a launch, t_u = round(g_u · A[e_u] h) and Σ_u B[e_u] t_u: programs that shrink, and what others add.

Several rows use many experts, whose A are a tenth of a launch's bytes. Programs share the columns of A, so that t is stored
long before others need it: the last of those that have the same rows adds the partial sums, in the order of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.pregated_linear.triton_call import dot, load, mask_of, share

if TYPE_CHECKING:
    from pallas_kernels.pregated_linear.kernel_triton import Launch

MAX_IDS = 16
"""Ids of experts that a program keeps in registers."""


def shrink(launch: Launch, name: str, tile: Array) -> None:
    """Publish `tile_m` elements of t of one expert for every row."""
    u, r, expert, layer, gate = _place(launch, name, tile)
    if launch.columns == 1:
        in_use = jnp.max(jnp.where(gate != 0, 1, 0)) > 0  # of an expert that no row uses nothing is read
    else:
        in_use = u < launch.refs["num_used"][0]

    @pl.when(in_use)
    def _store() -> None:
        (product,) = launch.times_h([(launch.refs["a"][name], (layer, expert))], r, launch.group.tiles.of_a)
        _store_t(launch, name, u, r, product, gate)

    launch.publish()


def shrink_part(launch: Launch, name: str, tile: Array, num_parts: int | None = None) -> None:
    """Publish partial sums of `tile_m` elements of A h; or t, of one's own and those that `num_parts` programs published."""
    (tile_m, tile_k), splits = launch.group.tiles.of_a, launch.group.tiles.shrink_splits
    a = launch.refs["a"][name]
    tiles = len(launch.refs["experts"]) * pl.cdiv(a.shape[2], tile_m)
    split, tile = (splits - 1, tile) if num_parts is not None else (tile // tiles, tile % tiles)
    u, r, expert, layer, gate = _place(launch, name, tile)
    in_use = u < launch.refs["num_used"][0]

    def steps(count: int) -> tuple[Array, Array]:
        first, last = share(count, split, splits)
        return first, jnp.where(in_use, last, first)

    (product,) = launch.times_h([(a, (layer, expert))], r, (tile_m, tile_k), steps)
    mask = jnp.broadcast_to((r + jnp.arange(tile_m) < a.shape[2])[:, None] & in_use, product.shape)
    here = u, pl.ds(r, tile_m), pl.ds(launch.zero, launch.columns)
    if num_parts is None:
        plgpu.store(launch.outs["parts"][name].at[split, *here], product, mask=mask)
    else:
        launch.wait(num_parts)
        for other in range(splits - 1):
            product += load(launch.outs["parts"][name].at[launch.zero + other, *here], mask)
        _store_t(launch, name, u, r, product, gate)
    launch.publish()


def _place(launch: Launch, name: str, tile: Array) -> tuple[Array, Array, Array, Array, Array]:
    """The place in the mixture, first row of A, expert, layer and gates of a program that shrinks."""
    tile_m = launch.group.tiles.of_a[0]
    tiles = pl.cdiv(launch.refs["a"][name].shape[2], tile_m)
    u, r = tile // tiles, tile % tiles * tile_m
    return u, r, launch.refs["experts"][u], launch.refs["layer"][0], launch.gate(u)


def _store_t(launch: Launch, name: str, u: Array, r: Array, product: Array, gate: Array) -> None:
    tile_m, rank = len(product), launch.refs["a"][name].shape[2]
    t = jnp.where(gate[None] != 0, product * gate[None], 0).astype(launch.refs["x"].dtype)  # [tile_m, columns]
    mask = (jnp.arange(launch.columns) < launch.batch)[:, None] & (r + jnp.arange(tile_m) < rank)[None]
    at = launch.outs["t"][name].at[u, pl.ds(launch.zero, launch.columns), pl.ds(r, tile_m)]
    plgpu.store(at, t.T, mask=mask)


class OneRow:
    """B of one row's experts, and their t, for which a program asks while columns of W are under way."""

    def __init__(self, launch: Launch, adapted: Sequence[str], row: Array):
        self._launch, self._adapted, self._row = launch, adapted, row
        self._width = pl.next_power_of_2(launch.refs["b"][adapted[0]].shape[3])
        self._b: dict[str, list[Array]] = {}
        self._t: dict[str, list[Array]] = {}

    def load_factors(self) -> None:
        """Load B [tile_m, R] of each expert: after the first columns of W, as its place depends on the expert's id."""
        refs, tile_m, zero = self._launch.refs, self._launch.group.tiles.tile_m, self._launch.zero
        for name in self._adapted:
            b = refs["b"][name]
            out, rank = b.shape[2:]
            inside = (self._row + jnp.arange(tile_m) < out)[:, None] & (jnp.arange(self._width) < rank)[None]
            rows, ranks = pl.ds(self._row, tile_m), pl.ds(zero, self._width)
            self._b[name] = [
                load(b.at[refs["layer"][0], refs["experts"][u], rows, ranks], inside & (refs["gates"][u, 0] != 0))
                for u in range(len(refs["experts"]))
            ]

    def load_t(self, num_shrink: int) -> None:
        """Wait until `num_shrink` programs have published t, and load it [R], of each expert."""
        self._launch.wait(num_shrink)
        gates, zero = self._launch.refs["gates"], self._launch.zero
        for name in self._adapted:
            t = self._launch.outs["t"][name]
            in_rank = jnp.arange(self._width) < t.shape[2]
            self._t[name] = [
                load(t.at[zero + u, zero, pl.ds(zero, self._width)], in_rank & (gates[u, 0] != 0))
                for u in range(len(t))
            ]

    def expand(self, names: Sequence[str], totals: list[Array]) -> list[Array]:
        """totals + Σ_u B[e_u] t_u of each linear, [tile_m, 1]."""
        found = list(totals)
        for i, name in enumerate(names):
            if name in self._b:
                pairs = zip(self._b[name], self._t[name], strict=True)
                added = [b.astype(jnp.float32) * t.astype(jnp.float32)[None] for b, t in pairs]
                found[i] += jnp.sum(reduce(jnp.add, added), axis=1, keepdims=True)
        return found


def load_ids(launch: Launch) -> list[Array]:
    """The ids of several rows' experts, if registers hold them: loaded before the product with W."""
    experts = launch.refs["experts"]
    return [experts[u] for u in range(len(experts))] if len(experts) <= MAX_IDS else []


def expand_rows(
    launch: Launch, names: Sequence[str], row: Array, totals: list[Array], experts: list[Array], split: Any
) -> list[Array]:
    """totals + Σ_u B[e_u] t_u of several rows, [tile_m, columns], `experts` their ids.

    Over the experts in use, of their ranks as many at a time as columns of W."""
    refs, tiles = launch.refs, launch.group.tiles
    adapted = [name for name in names if name in refs["b"]]
    out, rank = refs["b"][adapted[0]].shape[2:]
    width = max(16, min(tiles.tile_k, pl.next_power_of_2(rank)))
    runs = pl.cdiv(rank, width)
    rows = None if out % tiles.tile_m == 0 else row + jnp.arange(tiles.tile_m) < out
    batch = None if launch.batch == launch.columns else jnp.arange(launch.columns) < launch.batch

    def step(i: Array, totals: list[Array]) -> list[Array]:
        u, r = (i, launch.zero) if runs == 1 else (lax.div(i, runs), lax.rem(i, runs) * width)
        expert = experts[0] if experts else refs["experts"][u]
        for other, chosen in enumerate(experts[1:], 1):
            expert = jnp.where(u == other, chosen, expert)
        in_rank = None if rank % width == 0 else r + jnp.arange(width) < rank
        of_b = refs["layer"][0], expert, pl.ds(row, tiles.tile_m), pl.ds(r, width)
        of_t = u, pl.ds(launch.zero, launch.columns), pl.ds(r, width)
        found = list(totals)
        for n, name in enumerate(names):
            if name in adapted:
                b_u = load(refs["b"][name].at[of_b], mask_of((tiles.tile_m, width), rows, in_rank))
                t_u = load(launch.outs["t"][name].at[of_t], mask_of((launch.columns, width), batch, in_rank))
                found[n] += dot(b_u, t_u, trans_b=True)
        return found

    first, last = share(refs["num_used"][0] * runs, split, tiles.splits)
    return lax.fori_loop(first, last, step, totals)
