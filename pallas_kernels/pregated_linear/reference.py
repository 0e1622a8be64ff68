"""The linear in plain XLA: the definition that the kernels are tested against, and the way on devices without one.

y[b] = W[l] x[b] + Σ_u B[l, e_u] round(g[u, b] · A[l, e_u] x[b])        products and sums in fp32, y rounded once

The gated A x is rounded to the type of x, in which B is multiplied.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.megakernel.mixture import Mixture

_product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def pregated_linear_xla(
    x: Float[Array, "B in"],
    weight: Float[Array, "L out in"],
    a: Float[Array, "L E R in"] | None,
    b: Float[Array, "L E out R"] | None,
    mixture: Mixture | None,
    layer: int | Int[Array, ""],
) -> Float[Array, "B out"]:
    """One linear of one layer; without `a`, `b` and `mixture` a plain one."""
    total = _product("bi,oi->bo", x, weight[layer])
    if a is not None and b is not None and mixture is not None:
        used = mixture.gates != 0  # [U, B]; an expert left out stays out, whatever it holds
        a, b = (
            jnp.where(used.any(axis=1)[:, None, None], factor[layer, mixture.experts], 0) for factor in (a, b)
        )  # [U, R, in], [U, out, R]
        t = (_product("bi,uri->ubr", x, a) * mixture.gates[..., None]).astype(x.dtype)
        total = total + _product("ubr,uor->bo", t, b)
    return total.astype(x.dtype)
