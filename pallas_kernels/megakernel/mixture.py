"""Mixtures: the distinct experts that the rows of a batch use together, and their gates: Σ_u g[u, b] · B[e_u] (A[e_u] x[b]).

The gates come before layer 0 (arXiv 2603.11873, Eq. 2), so a mixture is made once per token and serves every linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Mixture:
    """Row b uses expert `experts[u]` with `gates[u, b]`, in fp32 and with the scale s = α/R in it; 0 where it does not.

    An expert whose gates are all 0 is left out, whatever it holds. An id may come more than once.
    """

    experts: Int[Array, " U"]
    gates: Float[Array, "U B"]


def make_mixture(experts: Int[Array, "B k"], gates: Float[Array, "B k"], scale: float, num_experts: int) -> Mixture:
    """The U = min(E, B·k) experts of a batch whose row b uses `experts[b, j]` with scale · `gates[b, j]`.

    The experts of one row keep their order. Those of several are the distinct ones in use, by id; the places too many
    repeat the first of them with gates of 0. An expert that comes twice in a row counts with the sum of its gates.
    """
    batch, top_k = experts.shape
    experts, gates = experts.astype(jnp.int32), scale * gates.astype(jnp.float32)
    if batch == 1 and top_k <= num_experts:
        return Mixture(experts[0], gates.T)
    every = jnp.arange(num_experts, dtype=jnp.int32)
    chosen = experts[None] == every[:, None, None]  # [E, B, k]
    dense = jnp.where(chosen, gates[None], 0).sum(axis=-1)  # [E, B]
    used = (dense != 0).any(axis=1)
    order = jnp.argsort(~used, stable=True)[: min(num_experts, batch * top_k)].astype(jnp.int32)
    return Mixture(jnp.where(used[order], order, order[0]), dense[order])


def used_first(mixture: Mixture) -> tuple[Mixture, Int[Array, 1]]:
    """The same mixture with its experts in use in front, and how many they are, at least one: what kernels loop over."""
    in_use = (mixture.gates != 0).any(axis=1)
    order = jnp.argsort(~in_use, stable=True)
    return Mixture(mixture.experts[order], mixture.gates[order]), jnp.maximum(in_use.sum(dtype=jnp.int32), 1)[None]
