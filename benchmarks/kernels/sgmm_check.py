"""Errors of a merge W + Σ_j c_j · B[e_j] A[e_j]: all of it against the plain reference, some rows against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.sgmm import Terms
from pallas_kernels.sgmm.reference import merge_layer

Weights = dict[str, Array]


def wrong_elements(merged: Weights, base: Weights, a: Weights, b: Weights, terms: Terms) -> Array:
    """Number of elements of the whole result further than one unit in the last place from the reference."""

    def count(layer: Array, total: Array) -> Array:
        for name, w in merged.items():
            reference = merge_layer(base[name][layer], a[name][layer], b[name][layer], terms).astype(jnp.float32)
            allowed = jnp.finfo(w.dtype).eps * abs(reference) + 2e-6
            close = abs(w[layer].astype(jnp.float32) - reference) <= allowed  # False for NaN
            total += jnp.sum(~close, dtype=jnp.float32)
        return total

    return jax.lax.fori_loop(0, next(iter(merged.values())).shape[0], count, jnp.float32(0))


@jax.jit
def sample(arrays: tuple[Weights, ...], layer: Array, rows: dict[str, Array]) -> tuple[Weights, ...]:
    """The rows of one layer of W, base and B, and all of A."""
    merged, base, a, b = arrays
    w_rows, base_rows = ({name: w[layer, rows[name]] for name, w in x.items()} for x in (merged, base))
    return w_rows, base_rows, {n: x[layer] for n, x in a.items()}, {n: x[layer][:, rows[n]] for n, x in b.items()}


def errors(
    layer: int, num_rows: int, merged: Weights, base: Weights, a: Weights, b: Weights, terms: Terms
) -> dict[str, float]:
    """Errors of random rows of one layer against float64 on the host, and those of the correctly rounded result: the
    largest, and the relative error in norm."""
    rng = np.random.default_rng(0)
    rows = {n: np.sort(rng.choice(w.shape[1], num_rows, replace=False)) for n, w in merged.items()}
    w_rows, base_rows, a_layer, b_rows = jax.device_get(sample((merged, base, a, b), layer, rows))
    largest, squares, norm = np.zeros(2), np.zeros(2), 0.0
    for name in merged:
        exact = base_rows[name].astype(np.float64)
        for expert, coefficient in zip(*jax.device_get((terms.experts, terms.coefficients)), strict=True):
            if coefficient:
                product = b_rows[name][expert].astype(np.float64) @ a_layer[name][expert].astype(np.float64)
                exact += np.float64(coefficient) * product
        rounded = exact.astype(np.float32).astype(w_rows[name].dtype)
        off = [np.abs(x.astype(np.float64) - exact) for x in (w_rows[name], rounded)]
        largest = np.maximum(largest, [x.max() for x in off])
        squares, norm = squares + [np.sum(x**2) for x in off], norm + float(np.sum(exact**2))
    relative = np.sqrt(squares / norm)
    return {
        "max_error": float(largest[0]), "max_error_of_rounding": float(largest[1]),
        "relative_error": float(relative[0]), "relative_error_of_rounding": float(relative[1]),
    }  # fmt: skip
