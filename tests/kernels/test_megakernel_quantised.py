"""The fused decoding step with quantised linears against the model's own modules, whose weights are dequantised.

Its schedule runs in NumPy with weights dequantised in float64 by the definition of their layout, its kernel in the
interpreter and, with `-m gpu`, compiled.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from fused_cases import GEMMA, GRANITE, LLAMA2_7B, Case, make, plan_of
from fused_check import check, interpreted, on_gpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from adafuse_jax.inference.backends.megakernel import Fused, fused_step
from adafuse_jax.models.config import LINEARS
from pallas_kernels.megakernel import executor_np, kernel_sm90, unsupported_reason
from pallas_kernels.megakernel.dequantise import _by_definition, _in_registers, _moved, _moved_registers
from pallas_kernels.megakernel.register_tiles import load, store
from pallas_kernels.megakernel.schedule import Scalars, TileSchedule
from pallas_kernels.megakernel.sizes import TILE_K, WGMMA_M
from pallas_kernels.quantised import INT4, INT4_G64, INT8, QuantLayout
from pallas_kernels.quantised.reference import dequantise_np

LAYOUTS = {layout.name: layout for layout in (INT8, INT4, INT4_G64)}
SMALL = Case(embed_dim=128, hidden_dim=384, heads=(4, 2, 64))
FAMILIES = {
    "Gemma": replace(GEMMA, hidden_dim=256),
    "Gemma, context in parts, three rows": replace(GEMMA, hidden_dim=256, batch=3, slots=1024, position=900),
    "Granite, two rows": replace(GRANITE, hidden_dim=256, num_layers=2, batch=2),
}
CASES = {
    "int8, q and down, two rows": (replace(SMALL, batch=2, targets=("q_proj", "down_proj"), layout=INT8), 2),
    "int4-g64, bare": (replace(SMALL, heads=(4, 1, 64), layout=INT4_G64), 2),
    "int4, all 7": (replace(SMALL, targets=LINEARS, layout=INT4), 1),
    "int8, two blocks attend to the same heads": (
        Case(embed_dim=512, hidden_dim=256, heads=(4, 4, 128), targets=("o_proj",), layout=INT8), 8
    ),
    "int4, Gemma": (replace(FAMILIES["Gemma"], layout=INT4), 1),
}  # fmt: skip
COMPILED = {
    f"{name}, {what}": replace(case, layout=layout)
    for name, layout in LAYOUTS.items()
    for what, case in {
        "bare": replace(SMALL, num_layers=3, heads=(4, 1, 64)),
        "all 7": replace(SMALL, num_layers=2, targets=LINEARS),
        "biases, norms": replace(
            SMALL, heads=(4, 2, 128), targets=("q_proj", "up_proj"), bias=True, qk_norm=True, embed_dim=384
        ),
        "32 rows": replace(SMALL, batch=32, num_layers=2, embed_dim=768, hidden_dim=1536, targets=LINEARS),
    }.items()
} | {
    f"{layout.name}, {family}": replace(FAMILIES[family], layout=layout)
    for layout, family in zip((INT4, INT8, INT4_G64), FAMILIES, strict=True)
}


@pytest.mark.parametrize("name", quick.first(CASES, 2))
def test_schedule_in_numpy(name, monkeypatch):
    monkeypatch.setattr(kernel_sm90, "run_megakernel", executor_np.run)
    case, num_ctas = CASES[name]
    check(case, compiled=False, num_ctas=num_ctas)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    case, num_ctas = CASES[name]
    parameters = plgpu.InterpretGPUParams(inline_mgpu="ignore")
    check(case, compiled=False, interpret=parameters, num_ctas=num_ctas, one_launch=num_ctas == 1)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    check(COMPILED[name], compiled=True)


def every_byte() -> np.ndarray:
    """[WGMMA_M, TILE_K] bytes: all of them, in every column."""
    return (np.arange(WGMMA_M)[:, None] * 4 + np.arange(TILE_K) * 7 + np.arange(WGMMA_M)[:, None] // 16).astype(
        np.uint8
    )


PLACES = np.array([16 * b + (0, 8, 4, 12)[p % 8 // 2] + 2 * (p % 2) + p // 8 for b in range(4) for p in range(16)])
"""Place of the tensor cores' operands → column of a K-tile."""


def moved_back(tile: np.ndarray) -> np.ndarray:
    columns = np.empty(tile.shape)
    columns[:, PLACES] = tile
    return columns


def codes_np(layout: QuantLayout) -> np.ndarray:
    """Codes less their offset, [WGMMA_M, columns]."""
    columns = TILE_K * 8 // layout.bits
    scales = np.ones((WGMMA_M, columns // (layout.group_size or columns)))
    return dequantise_np(every_byte(), scales, layout)


@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantised_by_definition(name):
    tiles = map(moved_back, _by_definition(jnp.asarray(every_byte()), LAYOUTS[name]))
    np.testing.assert_array_equal(np.concatenate([*tiles], 1), codes_np(LAYOUTS[name]))
    np.testing.assert_array_equal(moved_back(_moved(jnp.asarray(every_byte()))), every_byte())
    assert len(np.unique(every_byte())) == 256


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantised_in_registers(name):
    """Every code exactly, and at its column."""
    layout = LAYOUTS[name]
    tiles = 8 // layout.bits

    def kernel(bytes_gmem, out_gmem):
        packed = load(bytes_gmem, plgpu.Layout.WGMMA_UPCAST_2X)
        for i, tile in enumerate(_in_registers(packed, layout)):
            store(out_gmem.at[i], tile)

    out = jax.ShapeDtypeStruct((tiles, WGMMA_M, TILE_K), jnp.bfloat16)
    run = plgpu.kernel(kernel, out_type=out, compiler_params=kernel_sm90.COMPILER_PARAMS)
    found = np.asarray(run(jnp.asarray(every_byte())), np.float64)
    np.testing.assert_array_equal(np.concatenate([*map(moved_back, found)], 1), codes_np(layout))


@pytest.mark.gpu
@on_gpu
def test_columns_moved_in_registers():
    def kernel(x_gmem, out_gmem):
        store(out_gmem, _moved_registers(load(x_gmem, plgpu.Layout.WGMMA_UPCAST_2X)))

    out = jax.ShapeDtypeStruct((WGMMA_M, TILE_K), jnp.bfloat16)
    run = plgpu.kernel(kernel, out_type=out, compiler_params=kernel_sm90.COMPILER_PARAMS)
    found = np.asarray(run(jnp.asarray(every_byte(), jnp.bfloat16)), np.float64)
    np.testing.assert_array_equal(moved_back(found), every_byte())


@pytest.mark.parametrize("name", ["int8, q and down, two rows", "int4-g64, bare", "int4, all 7", "int4, Gemma"])
def test_lowers_for_a_gpu_without_one(name):
    model, adapter, cache, tokens, positions = make(CASES[name][0])
    arguments = jax.eval_shape(lambda: (model, adapter, Fused.of(model, adapter), tokens, positions, cache))
    step = jax.jit(partial(fused_step, num_ctas=132))
    step.trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 32])
def test_plan_has_whole_chunks(name, batch):
    """Slices are whole chunks of codes, each multiplied once; A's parts are whole K-tiles of the same slices."""
    plan = plan_of(LLAMA2_7B, batch=batch, max_experts_used=min(8, 2 * batch), layout=LAYOUTS[name])
    assert plan.stages >= 4
    assert plan.head.chunk_k_tiles == 1
    assert plan.o.fused_attention == (batch == 1)
    for group in plan.layer_groups:
        assert group.chunk_k_tiles == 2
        k_tiles, of_a = [], set()
        for cta in range(group.split_k):
            schedule = TileSchedule(group, plan, Scalars([0], 1, []), cta)
            k_tiles += range(schedule.first_k_tile, schedule.first_k_tile + schedule.num_k_tiles)
            assert 0 < schedule.num_k_tiles <= group.max_slice_k_tiles
            for part in range(group.a_split_k):
                first, number = schedule.a_chunks(part)
                of_a |= {*range(first, first + number)}
        assert k_tiles == [*range(group.in_dim // TILE_K)] == sorted(of_a)


def test_what_it_cannot_read_is_said():
    for changes, layout, said in (
        ({}, QuantLayout(4, 32), "the weights are int4-g32, and it takes groups of 64 and 128"),
        ({"hidden_dim": 11072}, INT8, "down_proj has 11072 inputs, and of quantised weights it takes multiples of 128"),
        ({"hidden_dim": 28800}, INT4, "with 32 rows it takes 28672 at most"),
        (
            {"hidden_dim": 16512, "head_dim": 256},
            INT4_G64,
            "room for 7 chunks of weights, and heads of 256",
        ),  # in bf16 8
    ):
        assert said in (
            unsupported_reason(replace(LLAMA2_7B, **changes), jnp.bfloat16, 32, LINEARS, layout=layout) or ""
        )
    for layout in LAYOUTS.values():
        for batch in (1, 32):
            used = {"rank": 64, "max_experts_used": min(8, 2 * batch), "layout": layout}
            assert unsupported_reason(LLAMA2_7B, jnp.bfloat16, batch, LINEARS, **used) is None
