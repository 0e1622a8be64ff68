"""Low-rank experts: E_i(x) = s · B_i σ(A_i x) with s = α/R, A ~ U(±1/√in), B = 0; σ is the identity for LoRA.

A is stacked as [L, E, R, in] and B as [L, E, out, R]; both train in fp32 and are used in the type of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from adafuse_jax.models.hooks import Routing
from adafuse_jax.models.remat import LOW_RANK, kept
from pallas_kernels.grouped_experts import grouped_product


class LoRAParam(nnx.Param):
    """A parameter that trains while the backbone stays frozen."""


class LoRAExperts(nnx.Module):
    """E low-rank experts of one linear in every layer; called on one layer's slice, A [E, R, in] and B [E, out, R]."""

    def __init__(
        self,
        num_layers: int,
        out_dim: int,
        in_dim: int,
        *,
        num_experts: int,
        rank: int,
        scale: float,
        activation: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs,
    ):
        bound = in_dim**-0.5
        shape = (num_layers, num_experts, rank, in_dim)
        self.A = LoRAParam(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        self.B = LoRAParam(jnp.zeros((num_layers, num_experts, out_dim, rank), jnp.float32))
        self.scale = scale
        self.activation = activation

    def __call__(self, x: Float[Array, "B T in"], routing: Routing) -> Float[Array, "B T out"]:
        """Σ_j g_j s B[e_j] σ(A[e_j] x), partial sums in fp32.

        Few tokens (a decode step) gather the factors of their own experts and read only those; otherwise all E experts
        run as two dense products and the gates, zero for the experts not chosen, select; or, if the routing has its tokens
        grouped, the chosen experts only.
        """
        if routing.grouped is not None:
            groups, gates = routing.grouped
            flat = x.reshape(-1, x.shape[-1])
            y = grouped_product(
                flat, self.A[...], self.B[...], gates, groups, self.scale, jax.default_backend() == "cpu", LOW_RANK
            )
            return y.reshape(*x.shape[:-1], -1)
        tokens, (num_experts, top_k) = x.shape[0] * x.shape[1], (self.A.shape[0], routing.experts.shape[-1])
        return self._gathered(x, routing) if tokens * top_k <= num_experts > 1 else self._dense(x, routing)

    def _dense(self, x: Array, routing: Routing) -> Array:
        if self.activation is None:
            return low_rank_product(x, self.A[...], self.B[...], self.scale * routing.dense_gates())
        a, b = self.A[...].astype(x.dtype), self.B[...].astype(x.dtype)
        h = self._activated(jnp.einsum("bti,eri->bter", x, a, preferred_element_type=jnp.float32))
        h = (h * (self.scale * routing.dense_gates()[..., None])).astype(x.dtype)
        return jnp.einsum("bter,eor->bto", h, b)

    def _gathered(self, x: Array, routing: Routing) -> Array:
        a, b = self.A[routing.experts].astype(x.dtype), self.B[routing.experts].astype(x.dtype)
        h = self._activated(jnp.einsum("bti,btkri->btkr", x, a, preferred_element_type=jnp.float32))
        h = (h * (self.scale * routing.gates[..., None])).astype(x.dtype)
        return jnp.einsum("btkr,btkor->bto", h, b)

    def _activated(self, h: Array) -> Array:
        return h if self.activation is None else self.activation(h)


@jax.custom_vjp
def low_rank_product(
    x: Float[Array, "B T in"], a: Float[Array, "E R in"], b: Float[Array, "E out R"], gates: Float[Array, "B T E"]
) -> Float[Array, "B T out"]:
    """y = Σ_e g_e B_e A_e x, all products in the type of x with sums in fp32.

    Only h_e = g_e A_e x is kept for the backward pass, beside the arguments; gradients of A and B are fp32, and a gate of 0
    has none.
    """
    return _low_rank_forward(x, a, b, gates)[0]


def _low_rank_forward(x: Array, a: Array, b: Array, gates: Array) -> tuple[Array, tuple[Array, ...]]:
    h = jnp.einsum("bti,eri->bter", x, a.astype(x.dtype), preferred_element_type=_sum_type(x))
    h = kept((h * gates[..., None]).astype(x.dtype), LOW_RANK)
    return jnp.einsum("bter,eor->bto", h, b.astype(x.dtype)), (x, a, b, gates, h)


def _low_rank_backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    x, a, b, gates, h = saved
    product = partial(jnp.einsum, preferred_element_type=_sum_type(x))
    dh = product("bto,eor->bter", dy, b.astype(x.dtype))
    d_gates = jnp.where(gates > 0, jnp.sum(dh * h, axis=-1) / jnp.where(gates > 0, gates, 1), 0)
    du = (dh * gates[..., None]).astype(x.dtype)
    dx = jnp.einsum("bter,eri->bti", du, a.astype(x.dtype))
    return dx, product("bter,bti->eri", du, x).astype(a.dtype), product("bto,bter->eor", dy, h).astype(b.dtype), d_gates


def _sum_type(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def dropped(x: Array, share: float, key: Key[Array, ""] | None, place: int) -> Array:
    """x with that share of its elements dropped and the rest scaled up; x itself without a key. Every `place` of a layer
    draws its own; the experts of one place see the same."""
    if key is None or share == 0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - share, x.shape)
    return jnp.where(keep, x / (1 - share), 0).astype(x.dtype)
