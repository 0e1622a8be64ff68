"""Codes and scales against NumPy in float64, and products with them against those of the dequantised weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantised import INT4, INT4_G64, INT8, QuantArray, QuantLayout, quantise, quantised_product
from pallas_kernels.quantised.quant_array import FACTORS, MARGIN
from pallas_kernels.quantised.reference import dequantise_np, errors_np, integers_np, scales_np

LAYOUTS = [INT8, INT4, INT4_G64, QuantLayout(4, 32)]


def drawn(layout: QuantLayout, dtype: str, out: int = 9, in_dim: int = 256) -> tuple[np.ndarray, QuantArray]:
    """A matrix, one of whose rows is 0, in float64, and its codes and scales."""
    weight = np.random.default_rng(0).standard_normal((out, in_dim)) * np.geomspace(1e-3, 10, out)[:, None]
    weight[4] = 0
    array = jnp.asarray(weight, dtype)
    return np.asarray(array, np.float64), quantise(array, layout, layout.scale_dtype(dtype))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_against_numpy(layout: QuantLayout, dtype: str):
    weight, found = drawn(layout, dtype)
    scales = np.asarray(found.scales, np.float64)
    candidates = [scales_np(weight, layout, factor) for factor in (FACTORS if layout.bits == 4 else (1.0,))]
    candidates = [c.astype(found.dtype).astype(np.float64) for c in candidates]
    eps = float(jnp.finfo(found.dtype).eps)
    assert np.any([np.isclose(scales, c, rtol=eps, atol=0) for c in candidates], axis=0).all()
    least = np.min([errors_np(weight, c, layout) for c in candidates], axis=0)
    assert (errors_np(weight, scales, layout) <= least * (1 + 2 * MARGIN) + 1e-12).all()
    of_column = np.repeat(scales, layout.group_size or weight.shape[1], axis=1)
    exact = dequantise_np(np.asarray(found.codes), scales, layout)
    steps = np.divide(weight, of_column, out=np.zeros_like(weight), where=of_column != 0)
    is_tie = abs(abs(steps) % 1 - 0.5) < 1e-5
    difference = exact - integers_np(weight, scales, layout) * of_column
    assert (difference[~is_tie] == 0).all()
    assert found.shape == weight.shape
    assert found.codes.nbytes == weight.size * layout.bits // 8
    limited = abs(steps) > layout.offset - 1.5
    assert (abs(exact - weight)[~limited] <= abs(of_column[~limited]) * 0.501).all()
    rounded = np.asarray(found.dequantised(dtype), np.float64)
    np.testing.assert_allclose(
        rounded, exact, rtol=float(jnp.finfo(dtype).eps) / 2, atol=1e-7 if dtype == "float16" else 0
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_code_has_its_place(layout: QuantLayout):
    """All values of a code, in each column."""
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 2**layout.bits, (3, 128)), jnp.uint8)
    packed = layout.pack(codes)
    np.testing.assert_array_equal(layout.unpack(packed), codes)
    exact = dequantise_np(np.asarray(packed), np.ones((3, 128 // (layout.group_size or 128))), layout)
    np.testing.assert_array_equal(exact, np.asarray(codes, int) - layout.offset)


@pytest.mark.parametrize("layout", [INT8, INT4_G64], ids=lambda layout: layout.name)
def test_product_and_its_gradient(layout: QuantLayout):
    """Equality with the dequantised weights to the last bit, under vmap too; codes and scales have no gradient."""
    _, weight = drawn(layout, "bfloat16")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 256)), jnp.bfloat16)
    dense = weight.dequantised(jnp.bfloat16)
    product, pull = jax.vjp(lambda x: quantised_product(x, weight), x)
    wanted, pull_dense = jax.vjp(lambda x: jnp.einsum("...i,oi->...o", x, dense), x)
    np.testing.assert_array_equal(product, wanted)
    np.testing.assert_array_equal(pull(product)[0], pull_dense(wanted)[0])
    np.testing.assert_array_equal(jax.vmap(quantised_product, (0, None))(x, weight), product)


def test_what_a_backward_pass_keeps():
    """Codes and scales, not the dequantised weight, which has the type of x."""
    _, weight = drawn(INT4, "bfloat16")
    _, pull = jax.vjp(lambda x: quantised_product(x, weight), jnp.ones((2, 256), jnp.bfloat16))
    kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape"))
    assert kept == sorted([((9, 128), "uint8"), ((9, 2), "bfloat16")])


def test_not_finite_and_not_whole():
    weight = jnp.ones((2, 256)).at[0, 3].set(jnp.nan).at[1, 200].set(jnp.inf)
    assert not jnp.isfinite(quantise(weight, INT4, jnp.float32).scales[0]).all()
    assert not jnp.isfinite(quantise(weight, INT8, jnp.float32).scales).any()
    with pytest.raises(ValueError, match="96 columns are no multiple of the group size 64"):
        quantise(jnp.ones((2, 96)), INT4_G64, jnp.float32)


def test_names():
    assert [layout.name for layout in LAYOUTS] == ["int8", "int4", "int4-g64", "int4-g32"]
    assert [QuantLayout.of_name(layout.name) for layout in LAYOUTS] == LAYOUTS
    assert QuantLayout.of_name("int3") is None
