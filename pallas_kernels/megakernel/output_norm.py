"""Norms of what attention and FFN add: x ← x + m · norm(y), y = o(…) or down(…).

A CTA cannot add its tiles of y before it knows rms(y), which all of y decides. So the group's epilogue stores y and its sums
of squares, and after one more grid barrier the CTAs share out the tiles of x.

    StoreOutput     y                                 → output, output_square_sums
    OutputNorm      x + m · norm(y), its squares      → x, x_weighted, square_sums
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.epilogue import AddResidual, k_tile_rows
from pallas_kernels.megakernel.plan import Plan
from pallas_kernels.megakernel.register_tiles import (
    ROWS,
    inverse_rms,
    load,
    load_transposed,
    over_columns,
    over_rows,
    rounded,
    store,
    store_transposed,
)
from pallas_kernels.megakernel.schedule import div, div_rem, strided_share
from pallas_kernels.megakernel.sizes import WGMMA_M, WGMMA_N

SHAPE = WGMMA_M, WGMMA_N


@dataclass(frozen=True)
class StoreOutput:
    """y, the input of its own norm."""

    buffers: Buffers
    plan: Plan

    def __call__(self, layer, names, row, columns):
        output = self.buffers.output

        def put(value):
            y = rounded(value, output.dtype)
            store_transposed(k_tile_rows(self.plan, output, row, columns), y)
            store(self.buffers.output_square_sums.at[div(row, WGMMA_M), columns], (y * y).sum(axis=0))

        return put


@dataclass(frozen=True)
class OutputNorm:
    """x + m · norm(y), where `add` adds to the residual and `norm(layer)` is the number of y's norm."""

    buffers: Buffers
    plan: Plan
    add: AddResidual
    norm: Callable[[Any], Any]
    embed_dim: int
    eps: float

    def run(self, layer) -> None:
        """Finish this CTA's tiles [WGMMA_M, WGMMA_N] of x."""
        buffers, plan = self.buffers, self.plan
        n_tiles = plan.padded_batch // WGMMA_N
        tiles = self.embed_dim // WGMMA_M * n_tiles
        first, number = strided_share(0, tiles, lax.axis_index("cta"), plan.num_ctas)

        def tile(n, _):
            k_tile, n_tile = div_rem(first + n * plan.num_ctas, n_tiles)
            row, columns = k_tile * WGMMA_M, pl.ds(n_tile * WGMMA_N, WGMMA_N)
            put = self.add(layer, (), row, columns)
            y = load_transposed(k_tile_rows(plan, buffers.output, row, columns)).astype(jnp.float32)
            weight = load(buffers.output_norms.at[self.norm(layer), pl.ds(row, WGMMA_M)], ROWS)
            r = inverse_rms(buffers.output_square_sums, self.embed_dim, self.eps, columns)
            normed = rounded(y * over_rows(r, SHAPE), weight.dtype)
            put(normed * over_columns(weight.astype(jnp.float32), SHAPE))

        lax.fori_loop(0, number, tile, None)
