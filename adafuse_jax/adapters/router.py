"""The router: which k of E experts a token uses, how much of each, and the loss that keeps the experts in use.

z = W_g x;   G = softmax(TopK(z))        (arXiv 2603.11873, Eq. 1), fp32
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.adapters.low_rank import LoRAParam
from adafuse_jax.models.hooks import Routing


def is_router(path: tuple) -> bool:
    """True for a router's leaf, by its path in the pytree of an adapter."""
    return "router" in jax.tree_util.keystr(path)


class Router(nnx.Module):
    """A bias-free linear W_g [E, in] in fp32, followed by top-k.

    `renormalize` takes the softmax over the k selected logits, so that the gates of a token sum to 1. Without it the
    gates are the selected entries of the softmax over all E logits. With `num_layers` there is one in every layer, W_g
    [L, E, in], called on one layer's slice.
    """

    def __init__(
        self,
        in_dim: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool,
        num_layers: int | None = None,
        rngs: nnx.Rngs,
    ):
        bound = in_dim**-0.5
        shape = (num_experts, in_dim) if num_layers is None else (num_layers, num_experts, in_dim)
        self.weight = LoRAParam(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        self.top_k = top_k
        self.renormalize = renormalize

    def __call__(self, x: Float[Array, "B T in"], available: Int[Array, ""] | None = None) -> Routing:
        """The routing of every token, among the first `available` experts if that is given."""
        logits = jnp.einsum("bti,ei->bte", x.astype(jnp.float32), self.weight[...], precision=jax.lax.Precision.HIGHEST)
        if available is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < available, logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)
        selected, experts = jax.lax.top_k(logits, self.top_k)  # [B, T, k]
        if self.renormalize:
            gates = jax.nn.softmax(selected, axis=-1)
        else:
            gates = jnp.take_along_axis(probabilities, experts, axis=-1)
        return Routing(experts, gates, probabilities)


def balance_loss(
    routing: Routing,
    mask: Bool[Array, "B T"],
    num_experts: Int[Array, "*routers"] | int | None = None,
    load: Float[Array, "*routers E"] | None = None,
) -> Float[Array, "*routers"]:
    """Switch-style load balance E · Σ_e f_e · P_e over the tokens of `mask`: 1 when balanced, E/k when collapsed.

    f_e is expert e's share of the top-k assignments, or `load` [E] if that is given; P_e its mean probability over all E
    logits. `num_experts` is E where a router has fewer than the arrays hold.
    """
    found, probability = expert_load(routing, mask)
    load = found if load is None else load
    size = routing.probabilities.shape[-1] if num_experts is None else num_experts
    return size * jnp.sum(load * probability, axis=-1)


def expert_load(
    routing: Routing, mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "*routers E"], Float[Array, "*routers E"]]:
    """(f, P): share of the assignments, and mean probability, of every expert over the tokens of `mask`."""
    num_experts, top_k = routing.probabilities.shape[-1], routing.experts.shape[-1]
    weight = mask.astype(jnp.float32) / jnp.maximum(mask.sum(), 1)
    chosen = jax.nn.one_hot(routing.experts, num_experts).sum(axis=-2)  # [*routers, B, T, E]
    load = jnp.einsum("bt,...bte->...e", weight, chosen) / top_k
    return load, jnp.einsum("bt,...bte->...e", weight, routing.probabilities)


def router_statistics(routing: Routing, mask: Bool[Array, "B T"]) -> dict[str, Array]:
    """Load per expert [E], mean entropy of the tokens' router distributions in nats, and share of tokens per pair [E, E];
    of many routers the means.

    `pair[a, b]` is the share of tokens that use both a and b (a ≠ b); its diagonal is the share that use a at all.
    """
    load, _ = expert_load(routing, mask)
    weight = mask.astype(jnp.float32) / jnp.maximum(mask.sum(), 1)
    chosen = jax.nn.one_hot(routing.experts, routing.probabilities.shape[-1]).sum(axis=-2)
    entropy = -jnp.sum(routing.probabilities * jnp.log(routing.probabilities + 1e-20), axis=-1)  # [*routers, B, T]
    of_routers = {
        "load": load,
        "entropy": jnp.einsum("bt,...bt->...", weight, entropy),
        "pair": jnp.einsum("bt,...bte,...btf->...ef", weight, chosen, chosen),
    }
    stacked = routing.experts.ndim - 3
    return {name: value.mean(axis=tuple(range(stacked))) for name, value in of_routers.items()}
