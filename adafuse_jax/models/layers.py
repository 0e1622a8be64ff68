"""The pieces of a decoder layer: linear, norm, gated product, head.

Weights are stacked over layers, [L, …]; a module is called on one layer's slice, so the code below never sees L.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adafuse_jax.models.config import Activation
from adafuse_jax.models.config import Norm as NormKind
from pallas_kernels.quantised import QuantArray, quantised_product


class Linear(nnx.Module):
    """y = x Wᵀ + b with W [out, in], Hugging Face's layout; stacked as [L, out, in], or a `QuantArray` of that shape."""

    def __init__(self, num_layers: int, out_dim: int, in_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (num_layers, out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((num_layers, out_dim), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*batch in"], weight: Float[Array, "out in"] | None = None
    ) -> Float[Array, "*batch out"]:
        """y = W x + bias, with `weight` instead of the layer's own W if given."""
        weight = self.weight[...] if weight is None else weight
        y = quantised_product(x, weight) if isinstance(weight, QuantArray) else jnp.einsum("...i,oi->...o", x, weight)
        return y if self.bias is None else y + self.bias[...]


class Norm(nnx.Module):
    """A norm over the last axis, one of `config.Norm`, statistics in fp32."""

    def __init__(self, shape: tuple[int, ...], *, kind: NormKind, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param((jnp.zeros if kind == "rms_1p" else jnp.ones)(shape, dtype))
        self.kind, self.eps = kind, eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return _norm(x, self.weight[...], self.kind, self.eps)

    @property
    def factor(self) -> Float[Array, "*shape"]:
        """The factor of the normed x: w, or 1 + w in fp32."""
        weight = self.weight[...]
        return weight.astype(jnp.float32) + 1 if self.kind == "rms_1p" else weight


# What cheap functions compute is computed again in the backward pass: their derivatives would keep fp32 copies of it.
@partial(jax.checkpoint, static_argnums=(2, 3))
def _norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], kind: NormKind, eps: float
) -> Float[Array, "*batch D"]:
    x32 = x.astype(jnp.float32)
    if kind == "layer":
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    if kind == "rms":
        return normed.astype(x.dtype) * weight
    return (normed * (weight.astype(jnp.float32) + (kind == "rms_1p"))).astype(x.dtype)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@partial(jax.checkpoint, static_argnums=2)
def gated_product(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], activation: Activation = "silu"
) -> Float[Array, "*batch F"]:
    """activation(gate) · up."""
    return ACTIVATIONS[activation](gate) * up


def scaled(x: Float[Array, "*shape"], multiplier: float) -> Float[Array, "*shape"]:
    """multiplier · x, rounded once."""
    return x if multiplier == 1 else (x.astype(jnp.float32) * multiplier).astype(x.dtype)


def softcapped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap · tanh(x / cap); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


VALUES_AT_A_TIME = 2**18
"""Weights of a quantised head that a CPU dequantises at a time: 1 MB."""


@jax.custom_vjp
def logit_product(hidden: Float[Array, "*batch D"], head: Float[Array, "V D"] | QuantArray) -> Float[Array, "*batch V"]:
    """hidden headᵀ in fp32. Its derivatives are products in the type of `hidden` and `head`, with sums in fp32. A quantised
    head has none, and is dequantised again for that of `hidden`."""
    if isinstance(head, QuantArray):
        if jax.default_backend() == "cpu":
            return _product_by_rows(hidden, head)
        head = head.dequantised(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def _product_by_rows(hidden: Array, head: QuantArray) -> Array:
    """hidden headᵀ, some rows of the head at a time. The pages of a whole W, new in each step, take a CPU ten times as long
    as the product."""
    x = hidden.astype(jnp.float32)

    def of_row(row: QuantArray) -> Array:
        return jnp.einsum("...d,d->...", x, row.dequantised(hidden.dtype).astype(jnp.float32))

    rows = max(1, VALUES_AT_A_TIME // head.shape[-1])
    return jnp.moveaxis(jax.lax.map(of_row, head, batch_size=rows), 0, -1)


def _logit_product_backward(saved: tuple[Array, Array | QuantArray], gradient: Array) -> tuple[Array, Array | None]:
    hidden, head = saved
    gradient = gradient.astype(hidden.dtype)
    if isinstance(head, QuantArray):
        return jnp.einsum("...v,vd->...d", gradient, head.dequantised(hidden.dtype)), None
    return jnp.einsum("...v,vd->...d", gradient, head), jnp.einsum("...v,...d->vd", gradient, hidden)


logit_product.defvjp(lambda hidden, head: (logit_product(hidden, head), (hidden, head)), _logit_product_backward)
