"""Symmetric weight-only quantisation: codes, scales and their layout in the place of a weight W [..., out, in].

    W[o, i] = s[o, g] · (c[o, i] − 2^(bits−1))        g = i // group_size, or 0 where a row has one scale
    s = f · max|W| / (2^(bits−1) − 1),   c = round(W / s) + 2^(bits−1), limited to 0 … 2^bits − 1

f is 1 for 8 bits; for 4 bits each group has the one of `FACTORS` with the least squared error: a smaller one limits the
largest weights, and is nearer to all others; with a negative one the larger side of the codes, −8, is that of positive
weights.

    bits   group_size   codes, uint8       scales
    8      None         [..., out, in]     [..., out, 1]
    4      G            [..., out, in/2]   [..., out, in/G]

Four bits: byte j of a group (0 ≤ j < G/2) holds the code of its column j in the low half and that of column j + G/2 in the
high one, so that both halves of a group's bytes meet a run of x. Groups are whole in any part of the columns that is a
multiple of G, as over several devices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
FACTORS = (*SHARES, *(-share for share in SHARES))
"""Scales of 4 bits that are tried, as multiples of the one with which the largest weight is exact."""
MARGIN = 1e-4
"""Part of the error by which a later scale must be better, so that sums in another order choose the same one."""


@dataclass(frozen=True, slots=True)
class QuantLayout:
    """Bits of a code, and the columns that share a scale; None: those of a row."""

    bits: int
    group_size: int | None = None

    @property
    def name(self) -> str:
        """`int8`, `int4` (groups of 128) or `int4-g64`: the values of `--quantize`, and others alike."""
        return f"int{self.bits}" + ("" if self.group_size in (None, 128) else f"-g{self.group_size}")

    @classmethod
    def of_name(cls, name: str) -> QuantLayout | None:
        """The layout with a `name`; None for other texts."""
        found = re.fullmatch(r"int(?:(8)|4(?:-g(\d{1,4}))?)", name)
        return found and (cls(8) if found[1] else cls(4, int(found[2] or 128)))

    @property
    def offset(self) -> int:
        """The code of 0."""
        return 2 ** (self.bits - 1)

    def groups(self, in_dim: int) -> int:
        """Scales of a row. Raises `ValueError` unless its columns are whole groups."""
        if self.group_size is None:
            return 1
        if in_dim % self.group_size:
            raise ValueError(f"{in_dim} columns are no multiple of the group size {self.group_size}")
        return in_dim // self.group_size

    def scale_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Type of the scales that `quantise` makes for a model of `dtype`: its own, and float32 of a float16 model, where
        those of small weights would be subnormal."""
        return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)

    def pack(self, codes: UInt8[Array, "*rows in"]) -> UInt8[Array, "*rows bytes"]:
        """One code a byte → bytes of this layout."""
        if self.bits == 8:
            return codes
        low, high = jnp.split(codes.reshape(*codes.shape[:-1], -1, self.group_size or 0), 2, axis=-1)
        return (low | high << 4).reshape(*codes.shape[:-1], -1)

    def unpack(self, packed: UInt8[Array, "*rows bytes"]) -> UInt8[Array, "*rows in"]:
        """The inverse of `pack`."""
        if self.bits == 8:
            return packed
        halves = packed.reshape(*packed.shape[:-1], -1, 1, (self.group_size or 0) // 2)
        shifts = 4 * jax.lax.broadcasted_iota(jnp.uint8, (2, 1), 0)  # no array, a constant that kernels refuse
        codes = (halves >> shifts) & 15  # no concatenation, which XLA writes value by value
        return codes.reshape(*packed.shape[:-1], -1)


INT8, INT4, INT4_G64 = QuantLayout(8), QuantLayout(4, 128), QuantLayout(4, 64)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, slots=True)
class QuantArray:
    """A weight [..., out, in]. Its two leaves have the keys `codes`, and `group_scales` or `channel_scales`, by which the
    rules of sharding tell an axis of groups from one of size 1."""

    codes: UInt8[Array, "*layers out bytes"]
    scales: Float[Array, "*layers out groups"]
    layout: QuantLayout

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], QuantLayout]:
        scales = "channel_scales" if self.layout.group_size is None else "group_scales"
        keys = jax.tree_util.GetAttrKey("codes"), jax.tree_util.GetAttrKey(scales)
        return tuple(zip(keys, (self.codes, self.scales), strict=True)), self.layout

    @classmethod
    def tree_unflatten(cls, layout: QuantLayout, children: tuple[Any, Any]) -> QuantArray:
        return cls(*children, layout)

    def __getitem__(self, at: Any) -> QuantArray:
        """A part along the axes in front of `out`; `…` is all of it."""
        return self if at is ... else jax.tree.map(lambda leaf: leaf[at], self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        return *self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.layout.bits

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the scales."""
        return self.scales.dtype

    def dequantised(self, dtype: DTypeLike) -> Float[Array, "*layers out in"]:
        """W, its products of code and scale rounded once to `dtype`."""
        codes = self.layout.unpack(self.codes).astype(jnp.float32) - self.layout.offset
        codes = codes.reshape(*self.scales.shape, -1)  # [..., out, groups, G]
        return (codes * self.scales[..., None].astype(jnp.float32)).astype(dtype).reshape(self.shape)


def quantise(weight: Float[Array, "*layers out in"], layout: QuantLayout, scale_dtype: DTypeLike) -> QuantArray:
    """The nearest codes for the scales as they are rounded to `scale_dtype`, of 4 bits those of `FACTORS` with the least
    squared error. A weight that is not finite makes a scale that is not. Raises `ValueError` for columns that are not whole
    groups."""
    grouped = weight.astype(jnp.float32).reshape(*weight.shape[:-1], layout.groups(weight.shape[-1]), -1)
    largest = jnp.abs(grouped).max(axis=-1)
    factors = np.array(FACTORS if layout.bits == 4 else (1.0,)) / (layout.offset - 1)

    def rounded(scales: Array) -> Array:
        steps = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None]
        return jnp.clip(jnp.round(grouped / steps), -layout.offset, layout.offset - 1)

    def better(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        scales = (largest * factor).astype(scale_dtype)
        difference = rounded(scales) * scales.astype(jnp.float32)[..., None] - grouped
        error = jnp.sum(difference * difference, axis=-1)
        is_less = error < best[0] * (1 - MARGIN)
        return (jnp.where(is_less, error, best[0]), jnp.where(is_less, scales, best[1])), None

    unknown, scales = jnp.full_like(largest, jnp.inf), (largest * np.float32(factors[0])).astype(scale_dtype)
    if len(factors) > 1:
        (_, scales), _ = jax.lax.scan(better, (unknown, scales), jnp.array(factors, jnp.float32))
    codes = (rounded(scales) + layout.offset).astype(jnp.uint8)
    return QuantArray(layout.pack(codes.reshape(weight.shape)), scales, layout)


@jax.custom_vjp
def quantised_product(x: Float[Array, "*batch in"], weight: QuantArray) -> Float[Array, "*batch out"]:
    """x Wᵀ with W dequantised to the type of x. For its derivative, of x alone, W is dequantised again: what a forward pass
    keeps is the codes and scales themselves, never W."""
    x, dense = _dequantised_after(x, weight)
    return jnp.einsum("...i,oi->...o", x, dense)


def _dequantised_after(x: Array, weight: QuantArray) -> tuple[Array, Array]:
    """x, and W in its type once x is there. Of unrolled layers XLA would else dequantise all at once, and keep what the
    forward pass has dequantised for the backward one."""
    x, scales = jax.lax.optimization_barrier((x, weight.scales))
    return x, replace(weight, scales=scales).dequantised(x.dtype)


def _product_backward(weight: QuantArray, gradient: Array) -> tuple[Array, None]:
    gradient, dense = _dequantised_after(gradient, weight)
    return jnp.einsum("...o,oi->...i", gradient, dense), None


quantised_product.defvjp(lambda x, weight: (quantised_product(x, weight), weight), _product_backward)
