"""The linears' kernel with quantised weights against float64: interpreted here, compiled with `-m gpu`."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from linear_cases import Case, assert_near
from test_pregated_linear import by_kernel

from pallas_kernels.pregated_linear import Group, Tiles, pregated_linear, tiles_for, unsupported_reason
from pallas_kernels.quantised import INT4, INT4_G64, INT8, QuantArray, QuantLayout, quantise

QKV = {"q": 64, "k": 37, "v": 32}
CASES = {
    "int4, one row": Case(outs=QKV, in_dim=384, layout=INT4),
    "int8, rows": Case(outs=QKV, in_dim=200, batch=3, layout=INT8),
    "int8, one row, ragged": Case(outs={"gate": 37, "z": 1}, in_dim=83, rank=24, dtype="float16", layout=INT8),
    "int4-g64, rows": Case(outs=QKV, in_dim=192, batch=5, num_experts=8, layout=INT4_G64),
    "int4-g32, plain": Case(outs=QKV, in_dim=96, plain=("q", "k", "v"), layout=QuantLayout(4, 32)),
    "int4, 32 rows": Case(outs={"q": 50}, in_dim=256, batch=32, num_experts=16, dtype="float16", layout=INT4),
    "int8, rows, fp32": Case(outs={"q": 33}, in_dim=40, batch=3, rank=8, dtype="float32", layout=INT8),
    "int4-g64, one row, fp32": Case(outs={"q": 33}, in_dim=320, rank=8, dtype="float32", layout=INT4_G64),
    "int4-g64, rows, fp32": Case(outs={"q": 33}, in_dim=128, batch=2, rank=8, dtype="float32", layout=INT4_G64),
}
LARGE_CASES = {
    "int4 token": Case(outs={"gate": 2752, "up": 2752}, in_dim=4096, num_experts=8, rank=64, layout=INT4),
    "int8 token": Case(outs={"q": 1024, "k": 256, "v": 256}, in_dim=1024, num_experts=8, rank=64, layout=INT8),
    "int4-g64 token, in 11008": Case(outs={"down": 1000}, in_dim=11008, num_experts=8, rank=64, layout=INT4_G64),
    "int4, 32 rows": Case(outs={"gate": 1408, "up": 1408}, in_dim=4096, batch=32, num_experts=8, rank=64, layout=INT4),
    "int8, 20 rows": Case(outs={"down": 1024}, in_dim=2752, batch=20, num_experts=8, rank=128, layout=INT8),
    "int4-g64, 8 rows": Case(outs={"down": 576}, in_dim=1536, batch=8, num_experts=8, rank=64, layout=INT4_G64),
}


def small(case: Case) -> Tiles:
    """Tiles of which a linear has several."""
    return Tiles(tile_m=16, tile_k=32, tile_q=2 * (case.layout.group_size or 16), num_warps=4, num_stages=1)


@pytest.mark.parametrize("case", quick.first(CASES, 4))
def test_interpreted(case: str):
    inputs, layer = CASES[case].draw(), CASES[case].layer
    assert_near(by_kernel(*inputs, layer, tiles=small(CASES[case]), interpret=True), *inputs, layer)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["int4, one row", "int8, rows", "int4-g64, rows"])
def test_default_tiles(case: str):
    inputs, layer, layout = CASES[case].draw(), CASES[case].layer, CASES[case].layout
    tiles = tiles_for(len(inputs[0]), [64], inputs[0].shape[1], 2, layout=layout)
    assert_near(by_kernel(*inputs, layer, tiles=replace(tiles, num_stages=2), interpret=True), *inputs, layer)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES])
def test_compiled(case: str):
    of_case = (CASES | LARGE_CASES)[case]
    inputs, layer = of_case.draw(), of_case.layer
    tiles = tiles_for(of_case.batch, [64], of_case.in_dim, inputs[0].dtype.itemsize, layout=of_case.layout)
    assert_near(by_kernel(*inputs, layer, tiles=tiles), *inputs, layer)


def test_norm_gated_pair_bias_and_residual():
    """The whole of a launch for one row."""
    case = Case(outs={"gate": 40, "up": 40}, in_dim=256, rank=8, layout=INT4_G64, dtype="float32")
    (x, weights, a, b, mixture), layer = case.draw(), case.layer
    rng = np.random.default_rng(3)
    norm, bias = jnp.asarray(rng.standard_normal((2, 256)), x.dtype), jnp.asarray(rng.standard_normal((2, 40)), x.dtype)
    residual = jnp.asarray(rng.standard_normal((1, 40)), x.dtype)
    group = Group(tiles=small(case), out_dtype=x.dtype, gated=("gate", "up"), eps=1e-5)
    at, used = jnp.full(1, layer, jnp.int32), jnp.full(1, 2, jnp.int32)
    y, _ = pregated_linear(
        x, weights, a, b, mixture, used, at, jnp.zeros(2, jnp.int32), group=group, norm=norm, biases={"up": bias},
        residual=residual, interpret=True,
    )  # fmt: skip
    dense = {name: weight.dequantised(x.dtype) for name, weight in weights.items()}
    wanted, _ = pregated_linear(
        x, dense, a, b, mixture, used, at, jnp.zeros(2, jnp.int32), group=group, norm=norm, biases={"up": bias},
        residual=residual, interpret=True,
    )  # fmt: skip
    np.testing.assert_allclose(y["gate"], wanted["gate"], rtol=1e-5, atol=1e-5)


def test_layouts_that_do_not_fit():
    x = jnp.ones((1, 128))
    one, zero = jnp.ones((1, 16, 128)), jnp.zeros(1, jnp.int32)
    group = Group(tiles=Tiles(tile_m=16, tile_k=32, num_warps=4, num_stages=1), out_dtype=x.dtype)
    for weights in (
        {"q": quantise(one, INT8, jnp.float32), "k": one},
        {"q": quantise(one, QuantLayout(8, 64), jnp.float32)},
    ):
        with pytest.raises(ValueError, match="they must have one layout: plain, int8, or int4 in groups of"):
            pregated_linear(x, weights, {}, {}, None, zero, zero, zero, group=group)


@pytest.mark.parametrize(("layers", "is_refused"), [(24, False), (25, True), (48, True), (49, False)])
def test_codes_at_places_that_the_kernel_cannot_tell(layers, is_refused):
    """Places behind the first 2 GiB of an array that has no more than 4; Qwen3-14B has 3.3 GiB of gate_proj in int8."""
    shape = layers, 17408, 5120
    weight = QuantArray(jax.ShapeDtypeStruct(shape, "uint8"), jax.ShapeDtypeStruct((*shape[:2], 1), "float32"), INT8)
    assert bool(unsupported_reason(1, {}, {"gate_proj": weight})) == is_refused
