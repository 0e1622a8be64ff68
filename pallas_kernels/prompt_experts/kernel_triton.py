"""The two products of prompts' experts as Pallas kernels for Triton: NVIDIA Ampere and newer.

    shrink         h[p] = g_p · A_e x[t]                p: the pair of token t and its expert e
    expand         z[t] = Σ_p B_e h[p]                  over the pairs p of token t
    expand_into    y[t] ← y[t] + Σ_p B_e h[p]
    expand_gated   silu(gate[t] + …) · (up[t] + …)      the same of two linears, and their gated product

A and B are those of all layers, of which the kernels read one in place. Programs of `shrink` share the columns of x, and
their partial sums are added up with the gates. `pairs` has the orders.

Both products are bound by what they read from the L2 cache: a program of `_expand` reads all of B's columns that it has, for
each expert of its tile of tokens. Its tiles are chosen for few such bytes, and for two programs or more on a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.pregated_linear.triton_call import dot, load
from pallas_kernels.prompt_experts.pairs import PAIR_TILE, TOKEN_TILE, Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Columns that a program takes at a time, its warps and its pipeline stages."""

    block: int
    num_warps: int
    num_stages: int


EXPAND, GATED = Tiles(block=128, num_warps=4, num_stages=3), Tiles(block=128, num_warps=8, num_stages=3)
SHRINK = {64: Tiles(block=64, num_warps=4, num_stages=3), 192: Tiles(block=64, num_warps=8, num_stages=3)}
"""By the ranks of a launch's linears together, at most."""
MAX_PROGRAMS, MAX_SPLITS, MAX_COLUMNS = {4: 264, 8: 132}, 8, max(SHRINK)
"""Programs of `shrink` that a GPU runs at once, by their warps; programs that share the columns of a tile, at most; ranks of
the linears of a launch together, at most."""


def unsupported_reason(rank: int, widths: Sequence[int], dtype: jnp.dtype) -> str | None:
    """The reason why the kernels do not support these experts, or None. `widths`: every in and out of adapted linears."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16 or float16"
    if rank not in (16, 32, 64, 128):
        return f"rank {rank} is none of 16, 32, 64, 128"
    if odd := [width for width in widths if width % 64]:
        return f"a width of {odd[0]} is no multiple of 64"
    return None


def shrink(
    x: Float[Array, "T in"],
    factors: Sequence[Float[Array, "L E R in"]],
    layer: Int[Array, 1],
    pairs: Pairs,
    *,
    interpret: bool = False,
) -> Float[Array, "n P R"]:
    """h of n linears that share the input x, in the type of x."""
    together = max(1, MAX_COLUMNS // factors[0].shape[2])
    parts = [factors[i : i + together] for i in range(0, len(factors), together)]
    sums = [_shrink(x, part, layer, pairs, interpret=interpret).sum(axis=0) for part in parts]
    gate = pairs.gate[:, None]
    return jnp.where(gate == 0, 0, jnp.concatenate(sums) * gate).astype(x.dtype)  # tiles without pairs are not written


def _shrink(
    x: Array, factors: Sequence[Array], layer: Array, pairs: Pairs, *, interpret: bool
) -> Float[Array, "splits n P R"]:
    """Partial sums of A_e x[t]."""
    (tokens, length), (_, num_experts, rank, _) = x.shape, factors[0].shape
    count, items = len(factors), len(pairs.expert)
    tiles = next(tiles for most, tiles in SHRINK.items() if count * rank <= most)
    block = min(tiles.block, length & -length)
    steps = length // block
    filled = max(1, items - pairs.used.shape[1] // 2)  # the last tile of an expert is filled to a half, on average
    splits = max(1, min(MAX_SPLITS, steps, MAX_PROGRAMS[tiles.num_warps] // filled))

    def prompt_shrink(x, factors, layer, token, expert, out) -> None:  # type: ignore[no-untyped-def]
        item, split = pl.program_id(0), pl.program_id(1)
        e = expert[item]

        @pl.when(e < num_experts)
        def _() -> None:
            rows = plgpu.load(token.at[pl.ds(item * PAIR_TILE, PAIR_TILE)])
            inside = jnp.broadcast_to((rows < tokens)[:, None], (PAIR_TILE, block))

            def add(step: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
                column = step * block
                xs = load(x.at[rows[:, None], column + jnp.arange(block)[None, :]], inside)
                own = [plgpu.load(a.at[layer[0], e, pl.ds(0, rank), pl.ds(column, block)]) for a in factors]
                return tuple(total + dot(xs, a, trans_b=True) for total, a in zip(totals, own, strict=True))

            begin, end = split * steps // splits, (split + 1) * steps // splits
            totals = lax.fori_loop(begin, end, add, (jnp.zeros((PAIR_TILE, rank), jnp.float32),) * count)
            for at, total in enumerate(totals):
                place = split, pl.ds(at, 1), pl.ds(item * PAIR_TILE, PAIR_TILE), pl.ds(0, rank)
                plgpu.store(out.at[*place], total[None])

    return pl.pallas_call(
        prompt_shrink, out_shape=jax.ShapeDtypeStruct((splits, count, items * PAIR_TILE, rank), jnp.float32),
        grid=(items, splits), compiler_params=_params(tiles), interpret=interpret,
        name="prompt_shrink",
    )(x, list(factors), layer, pairs.token, pairs.expert)  # fmt: skip


def expand(
    h: Float[Array, "n P R"],
    factor: Float[Array, "L E out R"],
    layer: Int[Array, 1],
    pairs: Pairs,
    *,
    linear: int = 0,
    interpret: bool = False,
) -> Float[Array, "T out"]:
    """Sum of the experts of each token, whose h is h[linear], in the type of h."""
    out = jax.ShapeDtypeStruct((len(pairs.order), factor.shape[2]), h.dtype)
    run = partial(_expand, tiles=EXPAND, interpret=interpret, name="prompt_expand")
    return run([], out, h, [factor], layer, pairs, [linear], lambda z: z)


def expand_into(
    y: Float[Array, "T out"],
    h: Float[Array, "n P R"],
    factor: Float[Array, "L E out R"],
    layer: Int[Array, 1],
    pairs: Pairs,
    *,
    linear: int = 0,
    interpret: bool = False,
) -> Float[Array, "T out"]:
    """y with what the experts give to it, whose h is h[linear]. y is donated."""
    run = partial(_expand, tiles=EXPAND, interpret=interpret, name="prompt_expand_into")
    return run([y], y, h, [factor], layer, pairs, [linear], lambda y: y)


def expand_gated(
    gate: Float[Array, "T out"],
    up: Float[Array, "T out"],
    h: Float[Array, "2 P R"],
    factors: Sequence[Float[Array, "L E out R"]],
    layer: Int[Array, 1],
    pairs: Pairs,
    *,
    interpret: bool = False,
) -> Float[Array, "T out"]:
    """silu(gate) · up, with what the experts give to both; h and factors are those of gate and up. gate is donated."""
    run = partial(_expand, tiles=GATED, interpret=interpret, name="prompt_expand_gated")
    return run([gate, up], gate, h, factors, layer, pairs, [0, 1], lambda gate, up: jax.nn.silu(gate) * up)


def _expand(
    ys: Sequence[Array],
    out: Array | jax.ShapeDtypeStruct,
    h: Array,
    factors: Sequence[Array],
    layer: Array,
    pairs: Pairs,
    linears: Sequence[int],
    combine: Callable[..., Array],
    *,
    tiles: Tiles,
    interpret: bool,
    name: str,
) -> Float[Array, "T out"]:
    """`combine` of the ys, or zeros without any, with what their experts give to them: an array like `out`, in the place of
    the first."""
    (tokens, length), rank = out.shape, h.shape[2]
    block, places = min(tiles.block, length & -length), h.shape[1]

    def kernel(ys, h, factors, layer, order, used, count, place, out) -> None:  # type: ignore[no-untyped-def]
        tile, first = pl.program_id(1), pl.program_id(0) * block
        rows = plgpu.load(order.at[pl.ds(tile * TOKEN_TILE, TOKEN_TILE)])
        at = (rows[:, None], (first + jnp.arange(block))[None, :])

        def add(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            own = plgpu.load(place.at[tile, i, pl.ds(0, TOKEN_TILE)])
            inside = jnp.broadcast_to((own < places)[:, None], (TOKEN_TILE, rank))
            found = []
            for linear, factor, total in zip(linears, factors, totals, strict=True):
                hs = load(h.at[tile * 0 + linear, own[:, None], jnp.arange(rank)[None, :]], inside)
                b = plgpu.load(factor.at[layer[0], used[tile, i], pl.ds(first, block), pl.ds(0, rank)])
                found.append(total + dot(hs, b, trans_b=True))
            return tuple(found)

        zeros = (jnp.zeros((TOKEN_TILE, block), jnp.float32),) * len(linears)
        totals = tuple(plgpu.load(y.at[*at]).astype(jnp.float32) for y in ys) or zeros
        totals = lax.fori_loop(0, count[tile], add, totals)
        plgpu.store(out.at[*at], combine(*totals).astype(out.dtype))

    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype), grid=(length // block, tokens // TOKEN_TILE),
        input_output_aliases={0: 0} if ys else {}, compiler_params=_params(tiles), interpret=interpret, name=name,
    )(list(ys), h, list(factors), layer, pairs.order, pairs.used, pairs.count, pairs.place)  # fmt: skip


def _params(tiles: Tiles) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
