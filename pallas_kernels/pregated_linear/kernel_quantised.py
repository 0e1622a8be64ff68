"""The product of a launch's input with quantised weights, whose codes become numbers in registers.

    8 bits    W h = s · Σ_i (c_i − 128) h_i                                              s: one of a row
    4 bits    W h = Σ_g s_g · Σ_j ((b_gj & 15) − 8) h_gj + ((b_gj >> 4) − 8) h_(g, j+G/2)   b: the bytes of group g

Codes of 4 bits are [L, out, groups, G/2], and x and its norm [.., groups, 2, G/2]: the two codes of a byte meet two runs of
x. Codes are exact in every type of x, so tensor cores multiply them as they are; scales are applied in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.pregated_linear.triton_call import dot, load, mask_of
from pallas_kernels.quantised import QuantArray

EXPONENT_23 = 0x4B000000
"""Bits of 2²³ in fp32."""

if TYPE_CHECKING:
    from pallas_kernels.pregated_linear.kernel_triton import Launch


def in_halves(x: Array, weight: QuantArray) -> Array:
    """x [.., in] as [.., groups, 2, G/2] for codes of 4 bits, itself for those of 8."""
    size = weight.layout.group_size
    return x if size is None else x.reshape(*x.shape[:-1], -1, 2, size // 2)


def for_kernel(weight: QuantArray) -> QuantArray:
    """The weight with codes of 4 bits as [L, out, groups, G/2]; no copy."""
    if weight.layout.group_size is None:
        return weight
    return QuantArray(weight.codes.reshape(*weight.scales.shape, -1), weight.scales, weight.layout)


def times_h(
    launch: Launch, weights: Sequence[QuantArray], row: Any, beside: Sequence[Callable[[], None]] = ()
) -> list[Array]:
    """W h of each weight for rows `row`…, [tile_m, columns] in fp32; `beside`: of one row, what to do before and after."""
    early, late = beside or (lambda: None, lambda: None)
    product = _Product(launch, weights, row)
    steps = pl.cdiv(product.steps_of, product.size)
    zeros = [jnp.zeros(product.total_shape, jnp.float32) for _ in weights]
    ahead = product.is_vector and launch.group.tiles.num_stages > 1

    def step(i: Array, carry: tuple) -> tuple:
        *sums, loaded = carry
        following = product.load(i + 1) if ahead else loaded
        return *product.multiply(loaded if ahead else product.load(i), *sums), following

    squares = jnp.zeros(product.x_shape if product.norm is not None else 1, jnp.float32)
    loaded = product.load(launch.zero) if ahead else []
    early()
    totals, squares, loaded = lax.fori_loop(0, steps - ahead, step, (zeros, squares, loaded))
    late()
    if ahead:
        totals, squares = product.multiply(loaded, totals, squares)
    if product.is_vector:
        for _ in totals[0].shape[1:]:
            totals = [jnp.sum(total, axis=-1) for total in totals]
        totals = [total[:, None] for total in totals]
    if weights[0].layout.group_size is None:
        totals = [total * product.row_scales(weight) for total, weight in zip(totals, weights, strict=True)]
    if product.norm is None:
        return totals
    scale = lax.rsqrt(_sum(squares) / launch.in_dim + launch.group.eps)
    return [total * scale for total in totals]


class _Product:
    """Loads and products of one program. A step takes `size` columns of 8 bits, or groups of 4 bits, one of several rows."""

    def __init__(self, launch: Launch, weights: Sequence[QuantArray], row: Any):
        self.launch, self.weights, self.row = launch, weights, row
        self.group_size, self.is_vector = weights[0].layout.group_size, launch.columns == 1
        self.x, self.norm = launch.refs["x_halves"], launch.refs["norm_halves"]
        tile_m, columns = launch.group.tiles.tile_m, launch.group.tiles.tile_q
        self.steps_of = launch.in_dim // (self.group_size or 1)
        self.size = columns // (self.group_size or 1) if self.is_vector or self.group_size is None else 1
        half = (self.group_size or 0) // 2
        self.x_shape = (self.size, half) if half else (self.size,)
        self.total_shape = (tile_m, *self.x_shape) if self.is_vector else (tile_m, launch.columns)
        self.rows = None
        if weights[0].codes.shape[1] % tile_m:
            self.rows = row + jnp.arange(tile_m) < weights[0].codes.shape[1]

    def load(self, i: Array) -> list[Array]:
        k = i * self.size
        inside = None if self.steps_of % self.size == 0 else k + jnp.arange(self.size) < self.steps_of
        return [*(part for w in self.weights for part in self._weight(w, k, inside)), *self._inputs(k, inside)]

    def _weight(self, weight: QuantArray, k: Array, inside: Array | None) -> list[Array]:
        refs, tile_m = self.launch.refs, self.launch.group.tiles.tile_m
        at = refs["layer"][0], pl.ds(self.row, tile_m), pl.ds(k, self.size)
        if self.group_size is None:
            return [load(weight.codes.at[at], mask_of((tile_m, self.size), self.rows, inside))]
        half = self.group_size // 2
        mask = mask_of((tile_m, self.size), self.rows, inside)
        of_codes = None if mask is None else jnp.broadcast_to(mask[:, :, None], (tile_m, self.size, half))
        codes = load(weight.codes.at[*at, pl.ds(self.launch.zero, half)], of_codes)
        scales = load(weight.scales.at[at], mask)
        if self.is_vector:
            return [codes, scales]
        return [codes.reshape(tile_m, half), scales]

    def _inputs(self, k: Array, inside: Array | None) -> list[Array]:
        """x, or its two runs, and the norm's weight alike."""
        zero, layer = self.launch.zero, self.launch.refs["layer"][0]
        sources = [(self.x, zero)] if self.norm is None else [(self.x, zero), (self.norm, layer)]
        if self.is_vector:
            if self.group_size is None:
                return [load(ref.at[at, pl.ds(k, self.size)], inside) for ref, at in sources]
            half = self.group_size // 2
            mask = None if inside is None else jnp.broadcast_to(inside[:, None], (self.size, half))
            return [
                load(ref.at[at, pl.ds(k, self.size), zero + which, pl.ds(zero, half)], mask)
                for ref, at in sources
                for which in (0, 1)
            ]
        columns, batch = self.launch.columns, self.launch.batch
        in_batch = None if batch == columns else jnp.arange(columns) < batch
        rows = pl.ds(zero, columns)
        if self.group_size is None:
            return [load(self.x.at[rows, pl.ds(k, self.size)], mask_of((columns, self.size), in_batch, inside))]
        half = self.group_size // 2
        mask = mask_of((columns, half), in_batch, None)
        return [load(self.x.at[rows, k, zero + which, pl.ds(zero, half)], mask) for which in (0, 1)]

    def multiply(self, loaded: list[Array], totals: list[Array], squares: Array) -> tuple[list[Array], Array]:
        parts = 1 if self.group_size is None else 2
        inputs = loaded[parts * len(self.weights) :]
        if self.is_vector:
            xs = [x.astype(jnp.float32) for x in inputs[:parts]]
            hs = xs
            if self.norm is not None:
                squares = squares + sum(x * x for x in xs)
                hs = [x * weight.astype(jnp.float32) for x, weight in zip(xs, inputs[parts:], strict=True)]
        else:
            hs = inputs
        totals = [
            total + self._times(loaded[parts * i : parts * (i + 1)], hs) for i, total in enumerate(totals)
        ]  # fmt: skip
        return totals, squares

    def _times(self, weight: list[Array], hs: list[Array]) -> Array:
        codes = weight[0].astype(jnp.int32)
        if self.group_size is None:
            return self._dot(_numbers(codes, 128), hs[0])
        scales = weight[1].astype(jnp.float32)
        low, high = _numbers(codes & 15, 8), _numbers(codes & 240, 128)  # the high one 16 times too large
        if self.is_vector:
            return (low * hs[0][None] + high * (hs[1] * 0.0625)[None]) * scales[:, :, None]
        return (self._dot(low, hs[0]) + self._dot(high, hs[1]) * 0.0625) * scales

    def _dot(self, numbers: Array, h: Array) -> Array:
        if self.is_vector:
            return numbers * h[None]
        return dot(numbers.astype(h.dtype), h, trans_b=True)

    def row_scales(self, weight: QuantArray) -> Array:
        """[tile_m, 1]."""
        at = self.launch.refs["layer"][0], pl.ds(self.row, self.launch.group.tiles.tile_m), self.launch.zero
        return load(weight.scales.at[at], self.rows).astype(jnp.float32)[:, None]


def _numbers(codes: Array, offset: int) -> Array:
    """codes − offset in fp32, for codes below 2²³. As the low bits of 2²³ they are one operation; a conversion of integers
    has a quarter of the rate of others."""
    return lax.bitcast_convert_type(codes | EXPONENT_23, jnp.float32) - (2**23 + offset)


def _sum(x: Array) -> Array:
    for _ in x.shape:
        x = jnp.sum(x, axis=-1)
    return x
