"""Activations of the feed-forward block and the soft cap, by exponentials alone:

silu(x) = x σ(x),    gelu(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) = x σ(√(8/π) (x + 0.044715 x³))
tanh(z) = 1 − 2 σ(−2z),    with σ(z) = 1 / (1 + e^(−z))
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def silu(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-x))


def gelu_tanh(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh}
"""By their names in transformers."""


def softcapped(x: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(x / cap)."""
    return cap - 2 * cap / (1 + jnp.exp(x * (2 / cap)))
