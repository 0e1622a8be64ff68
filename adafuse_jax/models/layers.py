"""The pieces of a decoder layer: linear, norm, gated product, rotary position embedding.

Weights are stacked over layers, [L, …]; a module is called on one layer's slice, so the code below never sees L.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adafuse_jax.models.config import Activation, RopeConfig
from adafuse_jax.models.config import Norm as NormKind


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


class Norm(nnx.Module):
    """A norm over the last axis, one of `config.Norm`, statistics in fp32."""

    def __init__(self, shape: tuple[int, ...], *, kind: NormKind, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param((jnp.zeros if kind == "rms_1p" else jnp.ones)(shape, dtype))
        self.kind, self.eps = kind, eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return _norm(x, self.weight[...], self.kind, self.eps)


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


@jax.custom_vjp
def logit_product(hidden: Float[Array, "*batch D"], head: Float[Array, "V D"]) -> Float[Array, "*batch V"]:
    """hidden headᵀ in fp32. Its derivatives are products in the type of `hidden` and `head`, with sums in fp32."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def _logit_product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, head = saved
    gradient = gradient.astype(hidden.dtype)
    return jnp.einsum("...v,vd->...d", gradient, head), jnp.einsum("...v,...d->vd", gradient, hidden)


logit_product.defvjp(lambda hidden, head: (logit_product(hidden, head), (hidden, head)), _logit_product_backward)


def rope_frequencies(rope: RopeConfig | None, head_dim: int) -> Float[Array, " H/2"]:
    """Angular frequency of each rotated pair, in radians per position.

    `llama3` divides long wavelengths by `factor`, keeps short ones, and blends between the two. Without a rotary embedding
    all are 0.
    """
    if rope is None:
        return jnp.zeros(head_dim // 2)
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
