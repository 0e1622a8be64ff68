"""The pieces of a decoder layer: linear, RMS norm, head.

Weights are stacked over layers, [L, …]; a module is called on one layer's slice, so the code below never sees L.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """y = x Wᵀ + b with W [out, in], Hugging Face's layout; stacked as [L, out, in]."""

    def __init__(self, num_layers: int, out_dim: int, in_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (num_layers, out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((num_layers, out_dim), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*batch in"], weight: Float[Array, "out in"] | None = None
    ) -> Float[Array, "*batch out"]:
        """y = W x + bias, with `weight` instead of the layer's own W if given."""
        y = jnp.einsum("...i,oi->...o", x, self.weight[...] if weight is None else weight)
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """x / rms(x) · w over the last axis, statistics in fp32."""

    def __init__(self, shape: tuple[int, ...], *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(shape, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return _rms_norm(x, self.weight[...], self.eps)


# What cheap functions compute is computed again in the backward pass: their derivatives would keep fp32 copies of it.
@partial(jax.checkpoint, static_argnums=2)
def _rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


@jax.checkpoint
def silu_product(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """silu(gate) · up."""
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def logit_product(hidden: Float[Array, "*batch D"], head: Float[Array, "V D"]) -> Float[Array, "*batch V"]:
    """hidden headᵀ in fp32. Its derivatives are products in the type of `hidden` and `head`, with sums in fp32."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def _logit_product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, head = saved
    gradient = gradient.astype(hidden.dtype)
    return jnp.einsum("...v,vd->...d", gradient, head), jnp.einsum("...v,...d->vd", gradient, hidden)


logit_product.defvjp(lambda hidden, head: (logit_product(hidden, head), (hidden, head)), _logit_product_backward)
