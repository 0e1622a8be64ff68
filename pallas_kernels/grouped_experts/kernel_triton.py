"""The three products of grouped experts as Pallas kernels for Triton: NVIDIA Ampere and newer.

For an item i, an expert e and a tile of tokens t of which some chose it (see `groups`), with W of the experts:

    project   h_i[t] = s g_i[t] · W_e x[t]
    expand    y[t]   = Σ_{i of t's tile} W_e h_i[t]
    outer     dW_e   = Σ_{i of e} Σ_t h_i[t] ⊗ x[t]

g is 0 for the tokens of the tile that did not choose e. W_e is [R, long] or, with `rank_last`, [long, R]. Sums are fp32, or
fp64 of fp64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.grouped_experts.groups import TILE, Groups

PROJECT = {"block": 64, "num_warps": 4, "num_stages": 4}
EXPAND = {"block": 128, "num_warps": 4, "num_stages": 2}
OUTER = {"block": 128, "num_warps": 4, "num_stages": 4}
"""Elements of the long dimension that a program takes at once, warps of a program, stages of its loop's pipeline."""


def project(
    x: Float[Array, "T long"],
    w: Float[Array, "E R long"] | Float[Array, "E long R"],
    gates: Float[Array, "I tile"],
    groups: Groups,
    h: Float[Array, "I tile R"] | None = None,
    *,
    scale: float,
    rank_last: bool,
    interpret: bool = False,
) -> list[Array]:
    """[h_i [I, tile, R], in the type of x]; given the h of the forward pass, of whose output x is the gradient, also the
    gradient of g, Σ_r h_i (W_e x) / g_i [I, tile], 0 where g is 0."""
    length, rank, items = x.shape[1], w.shape[2 if rank_last else 1], len(groups.expert)
    block, sums = _block(PROJECT, length), _sum_type(x)

    def grouped_project(order, tile, expert, start, gates, x, w, *refs) -> None:  # type: ignore[no-untyped-def]
        i = pl.program_id(0)
        past, out, d_gates = refs if len(refs) == 3 else (None, *refs, None)

        @pl.when(i < start[start.shape[0] - 1])
        def _() -> None:
            e, ranks, rows = expert[i], jnp.arange(rank), order[pl.ds(tile[i] * TILE, TILE)]

            def add(step: Array, total: Array) -> Array:
                columns = step * block + jnp.arange(block)
                xs = plgpu.load(x.at[rows[:, None], columns[None, :]])
                return total + _times(xs, _expert(w, e, ranks, columns, rank_last), transposed=not rank_last)

            product = jax.lax.fori_loop(0, length // block, add, jnp.zeros((TILE, rank), sums))
            g = gates[i, :]
            out[i, :, :] = (product * (scale * g)[:, None]).astype(out.dtype)
            if past is not None:
                dot = jnp.sum(product * past[i, :, :].astype(sums), axis=1)
                d_gates[i, :] = jnp.where(g == 0, 0, dot / jnp.where(g == 0, 1, g))

    shapes = [jax.ShapeDtypeStruct((items, TILE, rank), x.dtype)]
    if h is not None:
        shapes.append(jax.ShapeDtypeStruct((items, TILE), sums))
    given = (groups.order.reshape(-1), groups.tile, groups.expert, groups.start, gates, x, w)
    return pl.pallas_call(
        grouped_project, out_shape=shapes, grid=(items,),
        compiler_params=_params(PROJECT), interpret=interpret, name="grouped_project",
    )(*given, *([] if h is None else [h]))  # fmt: skip


def expand(
    h: Float[Array, "I tile R"],
    w: Float[Array, "E R long"] | Float[Array, "E long R"],
    groups: Groups,
    *,
    rank_last: bool,
    interpret: bool = False,
) -> Float[Array, "T long"]:
    """y, in the type of h."""
    (passes, tokens), rank, length = groups.order.shape, h.shape[2], w.shape[1 if rank_last else 2]
    block, tiles, sums = _block(EXPAND, length), tokens // TILE, _sum_type(h)

    def grouped_expand(order, expert, start, h, w, *y_refs, part: int) -> None:  # type: ignore[no-untyped-def]
        tile, y = part * tiles + pl.program_id(1), y_refs[-1]
        columns, ranks = pl.program_id(0) * block + jnp.arange(block), jnp.arange(rank)

        def add(i: Array, total: Array) -> Array:
            return total + _times(h[i, :, :], _expert(w, expert[i], ranks, columns, rank_last), transposed=rank_last)

        total = jax.lax.fori_loop(start[tile], start[tile + 1], add, jnp.zeros((TILE, block), sums))
        rows = order[pl.ds(tile * TILE, TILE)]
        place = y.at[rows[:, None], columns[None, :]]
        if part:  # what the passes before have summed
            total += plgpu.load(place).astype(sums)
        plgpu.store(place, total.astype(y.dtype))

    y: list[Array] = []
    for part in range(passes):
        y = [
            pl.pallas_call(
                partial(grouped_expand, part=part), out_shape=jax.ShapeDtypeStruct((tokens, length), h.dtype),
                grid=(length // block, tiles), input_output_aliases={5: 0} if y else {},
                compiler_params=_params(EXPAND), interpret=interpret, name="grouped_expand",
            )(groups.order.reshape(-1), groups.expert, groups.start, h, w, *y)
        ]  # fmt: skip
    return y[0]


def outer(
    h: Float[Array, "I tile R"],
    x: Float[Array, "T long"],
    groups: Groups,
    *,
    rank_last: bool,
    interpret: bool = False,
) -> Float[Array, "E R long"] | Float[Array, "E long R"]:
    """dW, in the type of sums."""
    rank, length, num_experts = h.shape[2], x.shape[1], groups.num_experts
    block, sums = _block(OUTER, length), _sum_type(x)

    def grouped_outer(order, tile, by_expert, expert_start, h, x, dw) -> None:  # type: ignore[no-untyped-def]
        e, columns = pl.program_id(1), pl.program_id(0) * block + jnp.arange(block)

        def add(place: Array, total: Array) -> Array:
            i = by_expert[place]
            rows = order[pl.ds(tile[i] * TILE, TILE)]
            return total + plgpu.dot(h[i, :, :], plgpu.load(x.at[rows[:, None], columns[None, :]]), trans_a=True)

        total = jnp.zeros((rank, block), sums)
        total = jax.lax.fori_loop(expert_start[e], expert_start[e + 1], add, total)
        place = _place(dw, e, jnp.arange(rank), columns, rank_last)
        plgpu.store(place, total.T if rank_last else total)

    shape = (num_experts, length, rank) if rank_last else (num_experts, rank, length)
    return pl.pallas_call(
        grouped_outer, out_shape=jax.ShapeDtypeStruct(shape, sums), grid=(length // block, num_experts),
        compiler_params=_params(OUTER), interpret=interpret, name="grouped_outer",
    )(groups.order.reshape(-1), groups.tile, groups.by_expert, groups.expert_start, h, x)  # fmt: skip


def _place(w: Any, e: Array, ranks: Array, columns: Array, rank_last: bool) -> Any:
    """The block of expert e, in the form that W has."""
    return w.at[e, columns[:, None], ranks[None, :]] if rank_last else w.at[e, ranks[:, None], columns[None, :]]


def _expert(w: Any, e: Array, ranks: Array, columns: Array, rank_last: bool) -> Array:
    return plgpu.load(_place(w, e, ranks, columns, rank_last))


def _times(x: Array, w: Array, *, transposed: bool) -> Array:
    return plgpu.dot(x, w, trans_b=transposed)


def _sum_type(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _block(tuning: dict[str, int], length: int) -> int:
    return min(tuning["block"], length & -length)


def _params(tuning: dict[str, int]) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=tuning["num_warps"], num_stages=tuning["num_stages"])
