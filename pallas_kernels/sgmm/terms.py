"""Terms that a merge adds to the weights: Σ_j c_j · B[e_j] A[e_j], the same experts e and coefficients c for every segment.

golden   c = s·g                    to a pristine copy        (arXiv 2603.11873, Eq. 6)
switch   c = s·(g^t − g^{t−1})      to the last token's weights, in one pass   (Eq. 9)
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Terms:
    """The products of a merge: expert ids, and their coefficients in fp32. A coefficient of 0 leaves its expert out; an
    expert may come more than once."""

    experts: Int[Array, " J"]
    coefficients: Float[Array, " J"]


def golden_terms(experts: Int[Array, " k"], gates: Float[Array, " k"], scale: float) -> Terms:
    """The k products of one token: Δ(g) = Σ_j s g_j B[e_j] A[e_j], s = α/R."""
    return Terms(experts, scale * gates.astype(jnp.float32))


def switch_terms(
    previous: tuple[Int[Array, " k"], Float[Array, " k"]],
    current: tuple[Int[Array, " k"], Float[Array, " k"]],
    scale: float,
) -> Terms:
    """The products that take the weights from the previous token's (experts, gates) to the current one's:
    Δ(g^t) − Δ(g^{t−1}), 2k of them.

    An expert of both tokens is one product with the coefficient s·(g^t − g^{t−1}); its other place gets coefficient 0.
    The experts within one token differ, as the router's do. Gates of 0 mean that nothing is merged yet.
    """
    (old_experts, old_gates), (new_experts, new_gates) = previous, current
    same = new_experts[:, None] == old_experts[None]  # [k, k]
    shared = jnp.where(same, old_gates[None], 0).sum(axis=1)
    gates = jnp.concatenate([new_gates - shared, jnp.where(same.any(axis=0), 0, -old_gates)])
    return golden_terms(jnp.concatenate([new_experts, old_experts]), gates, scale)
