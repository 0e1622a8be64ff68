"""Tiles [HALF, N] in the registers of a warpgroup, laid out as the tensor cores leave them, and their ways to memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.plan import QUERIES, div, rem

COMPILER = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
"""Every layout is given, because inferring them takes most of the time to compile."""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a vector [N], equal in all rows of a tile
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector [HALF], equal in all columns


def over_rows(vector, shape):
    """[N] → [HALF, N]."""
    return lax.broadcast_in_dim(vector, shape, [1])


def over_columns(vector, shape):
    """[HALF] → [HALF, N]."""
    return lax.broadcast_in_dim(vector, shape, [0])


def load(ref, layout=plgpu.Layout.WGMMA):
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref, value):
    """To device memory: from JAX 0.12 on, a plain assignment would refuse what does not fill cache lines."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def store_transposed(ref, tile):
    """ref [N, HALF] = tileᵀ."""
    store(ref.transpose((1, 0)), plgpu.layout_cast(tile.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED))


def load_transposed(ref):
    """[HALF, N] of ref [N, HALF]."""
    tile = load(ref.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def part_of_single(parts_gmem, part, where):
    """The place of a part [HALF] of a single row's sum: a column of the narrow piece that eight parts are."""
    return parts_gmem.at[div(part, QUERIES), *where, 0, :, rem(part, QUERIES)]


def column(tile, number: int):
    """[HALF] of [HALF, columns]."""
    numbers = plgpu.broadcasted_iota(jnp.int32, tile.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(numbers == number, tile, 0).sum(axis=1)


def sum_of(parts):
    first, *others = parts
    return sum(others, first)


def silu(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-x))
