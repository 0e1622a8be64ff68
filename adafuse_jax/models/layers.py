"""The pieces of a decoder layer: linear, RMS norm, rotary position embedding.

Weights are stacked over layers, [L, …]; a module is called on one layer's slice, so the code below never sees L.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adafuse_jax.models.config import RopeConfig
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


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float[Array, " H/2"]:
    """Angular frequency of each rotated pair, in radians per position.

    `llama3` divides long wavelengths by `factor`, keeps short ones, and blends between the two.
    """
    frequency = rope.theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return frequency * (keep + (1 - keep) / rope.factor)
    return frequency


def rope_tables(
    positions: Int[Array, "B T"], frequencies: Float[Array, " H/2"]
) -> tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]]:
    """cos and sin of every position's angles, fp32."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T 1 H/2"], sin: Float[Array, "B T 1 H/2"]
) -> Float[Array, "B T heads H"]:
    """Rotate the pairs (x_i, x_{i+H/2}), in fp32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
