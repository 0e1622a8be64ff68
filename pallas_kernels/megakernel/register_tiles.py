"""Tiles [WGMMA_M, N] in the registers of a warpgroup, laid out as the tensor cores leave them, and their ways to
memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.sizes import WGMMA_M

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a vector [N], equal in all rows of a tile
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector [WGMMA_M], equal in all columns


def over_rows(vector, shape):
    """[N] → [WGMMA_M, N]."""
    return lax.broadcast_in_dim(vector, shape, [1])


def over_columns(vector, shape):
    """[WGMMA_M] → [WGMMA_M, N]."""
    return lax.broadcast_in_dim(vector, shape, [0])


def load(ref, layout=plgpu.Layout.WGMMA):
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref, value):
    """Store in device memory: from JAX 0.12 on, a plain assignment would refuse what does not fill cache lines."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def store_transposed(ref, tile):
    """ref [N, WGMMA_M] = tileᵀ."""
    store(ref.transpose((1, 0)), plgpu.layout_cast(tile.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED))


def load_transposed(ref):
    """[WGMMA_M, N] of ref [N, WGMMA_M]."""
    tile = load(ref.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def column(tile, number: int):
    """[WGMMA_M] of [WGMMA_M, columns]."""
    numbers = plgpu.broadcasted_iota(jnp.int32, tile.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(numbers == number, tile, 0).sum(axis=1)


def rounded(x, dtype):
    """x rounded to `dtype`, as fp32."""
    return x.astype(dtype).astype(jnp.float32)


def add_all(values):
    first, *others = values
    return sum(others, first)


def inverse_rms(square_sums, dim: int, eps: float, columns: Any = slice(None)):
    """1 / rms of rows of the batch, those in `columns`, whose sums of squares are the first dim / WGMMA_M rows of
    `square_sums` added up."""
    total: Any = 0.0
    for start in range(0, square_sums.shape[0], WGMMA_M):
        part = load(square_sums.at[pl.ds(start, WGMMA_M), columns])
        numbers = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA) + start
        part = jnp.where(numbers < dim // WGMMA_M, part, 0).sum(axis=0)
        total += part
    return lax.rsqrt(total / dim + eps)
