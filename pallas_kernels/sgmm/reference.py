"""The merge in plain XLA: the definition that the kernels are tested against, and the way on devices without one.

W[l] = base[l] + Σ_j c_j · B[l, e_j] A[l, e_j]        products and sum in fp32, rounded once
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.sgmm.terms import Terms


def merge_layer(
    base: Float[Array, "out in"], a: Float[Array, "E R in"], b: Float[Array, "E out R"], terms: Terms
) -> Float[Array, "out in"]:
    """One linear of one layer."""
    products = jnp.einsum(
        "jor,jri->joi",
        b[terms.experts],
        a[terms.experts],
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )
    used = terms.coefficients[:, None, None] != 0  # an expert left out stays out, whatever it holds
    total = base.astype(jnp.float32)
    for coefficient, product in zip(terms.coefficients, jnp.where(used, products, 0), strict=True):
        total = total + coefficient * product
    return total.astype(base.dtype)


def sgmm_xla(
    weights: dict[str, Array], a: dict[str, Array], b: dict[str, Array], terms: Terms, pristine: dict[str, Array] | None
) -> dict[str, Array]:
    """A loop over layers whose updates XLA makes in place; the temporaries are those of one layer."""

    def merge(layer: Array, weights: dict[str, Array]) -> dict[str, Array]:
        base = weights if pristine is None else pristine
        return {
            name: w.at[layer].set(merge_layer(base[name][layer], a[name][layer], b[name][layer], terms))
            for name, w in weights.items()
        }

    num_layers = next(iter(weights.values())).shape[0]
    return jax.lax.fori_loop(0, num_layers, merge, weights)
