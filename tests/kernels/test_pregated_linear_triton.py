"""The Triton kernel of the pre-gated linear: interpreted against float64, and compiled without a GPU.

It runs on one in test_pregated_linear.py (`-m gpu`).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from linear_cases import CASES, Case, assert_near  # noqa: E402
from triton.runtime import interpreter as triton_interpreter  # noqa: E402
from triton_host import GUARD, HostTensor, compiler_of, guarded  # noqa: E402

import pallas_kernels.pregated_linear.kernel_triton as kernels  # noqa: E402
from pallas_kernels.pregated_linear import Mixture, pregated_linear  # noqa: E402
from pallas_kernels.pregated_linear.kernel_triton import Config, configure, pregated_linear_triton, unsupported_reason  # noqa: E402

SMALL = Config(tile_m=16, tile_k=32, tile_r=16, num_warps=4, num_stages=2)
LLAMA_8B = {"q": 4096, "k": 1024, "v": 1024}
HELPERS = ("_times_x", "_is_used", "_shrink", "_load_b", "_linear")


def interpreted_call(*args, kernel, out_shape, zeroed_outputs, grid, name, num_warps, num_stages, **constants):
    """jax_triton.triton_call, interpreted: outputs are NaN before, and nothing but them may change."""
    inputs, memories = zip(*map(guarded, args), strict=True)
    blank = [np.full(x.shape, 0 if i in zeroed_outputs else -1, x.dtype) for i, x in enumerate(out_shape)]
    blank = [np.full_like(x, np.nan) if x.dtype.kind != "i" else x for x in blank]
    outputs, out_memories = zip(*map(guarded, blank), strict=True)
    before = [memory.copy() for memory in (*memories, *out_memories)]
    triton_interpreter.InterpretedFunction(kernel.fn)[grid](*map(HostTensor, (*inputs, *outputs)), **constants)
    for i, (memory, old) in enumerate(zip((*memories, *out_memories), before, strict=True)):
        if i >= len(memories):
            memory, old = (np.concatenate([x[:GUARD], x[-GUARD:]]) for x in (memory, old))
        assert memory.tobytes() == old.tobytes()
    assert outputs[-1] == constants["NUM_SHRINK"]
    return [jnp.asarray(x) for x in outputs]


def interpreted_sum(values, axis, keep_dims=False):
    """Triton's own is a kernel's function, which interpreted leaves the language patched."""
    return tl.reduce(values, axis, tl.standard._sum_combine, keep_dims=keep_dims)


@pytest.fixture
def interpreter(monkeypatch):
    for name in HELPERS:
        monkeypatch.setattr(kernels, name, triton_interpreter.InterpretedFunction(getattr(kernels, name).fn))
    monkeypatch.setattr(tl, "sum", interpreted_sum)
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=interpreted_call))


def without_bfloat16(case: Case) -> Case:
    """Triton's interpreter multiplies its bits as integers, and truncates to it."""
    return replace(case, dtype="float16" if case.dtype == "bfloat16" else case.dtype)


@pytest.mark.parametrize("case", [name for name in CASES if "random" not in name])
def test_interpreted(interpreter, case):
    case = without_bfloat16(CASES[case])
    inputs = case.draw()
    assert_near(pregated_linear_triton(*inputs, case.layer, config=SMALL), *inputs, case.layer)


@pytest.mark.parametrize("case", [name for name in CASES if "random" in name])
def test_default_tiles(interpreter, case):
    case = without_bfloat16(CASES[case])
    inputs = case.draw()
    assert_near(pregated_linear(*inputs, case.layer, implementation="triton"), *inputs, case.layer)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "bfloat16"), (80, "float32"), (90, "bfloat16"), (90, "float16")]
)
@pytest.mark.parametrize("batch", [1, 32])
def test_compiles_without_gpu(monkeypatch, tmp_path, capability, dtype, batch):
    """q, k and v of an 8B model: 16-byte loads, tensor cores for a batch, nothing in local memory."""
    compiled: list[Any] = []
    monkeypatch.setitem(sys.modules, "jax_triton", compiler_of(capability, compiled))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weights, a, b = {}, {}, {}
    for target, out_dim in LLAMA_8B.items():
        weights[target] = jax.ShapeDtypeStruct((32, out_dim, 4096), dtype)
        a[target] = jax.ShapeDtypeStruct((32, 8, 64, 4096), dtype)
        b[target] = jax.ShapeDtypeStruct((32, 8, out_dim, 64), dtype)
    num_used = min(8, 2 * batch)
    mixture = Mixture(jax.ShapeDtypeStruct((num_used,), "int32"), jax.ShapeDtypeStruct((num_used, batch), "float32"))
    x, layer = jax.ShapeDtypeStruct((batch, 4096), dtype), jax.ShapeDtypeStruct((), "int32")
    jax.eval_shape(partial(pregated_linear, implementation="triton"), x, weights, a, b, mixture, layer)
    ptx = compiled[0].asm["ptx"]
    wide = "ld.global.v4.b32" if batch == 1 else "cp.async.cg.shared.global"
    for wanted in (wide, "ld.global.gpu.acquire", "atom.global.gpu.release.add"):
        assert wanted in ptx, wanted
    assert ".local" not in ptx
    assert ("mma" in ptx) == (batch > 1 and dtype != "float32")  # tf32 would lose 13 bits


def test_unsupported_reasons():
    x, weights, *_ = Case(outs=dict.fromkeys("abcde", 8), in_dim=8, batch=33).draw()
    assert "5 targets" in str(unsupported_reason(x, weights))
    del weights["e"]
    assert "33 rows" in str(unsupported_reason(x, weights))
    assert unsupported_reason(x[1:], weights) is None


def test_unsupported_reason_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=None))
    case = Case(outs={"q": 8}, in_dim=8, batch=33)
    with pytest.raises(ValueError, match="cannot run as triton: there are 33 rows"):
        pregated_linear(*case.draw(), case.layer, implementation="triton")


def test_every_field_of_config_is_read(monkeypatch):
    launches = []

    def recording_call(*args, kernel, out_shape, **launch):
        launches.append(launch)
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=recording_call))
    case = Case(outs={"q": 64}, in_dim=64)
    for field in (None, *Config.__slots__):
        config = replace(SMALL, **{field: 2 * getattr(SMALL, field)}) if field else SMALL
        pregated_linear_triton(*case.draw(), case.layer, config=config)
    assert all(launch != launches[0] for launch in launches[1:])
    assert configure(1, 64, 2) != configure(2, 64, 2) != configure(2, 16, 2) != configure(2, 16, 4)
