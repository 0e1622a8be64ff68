"""The Triton kernel of SGMM: interpreted against float64, compiled without a GPU, and run on one (`-m gpu`)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

triton = pytest.importorskip("triton")

from triton.runtime import interpreter as triton_interpreter  # noqa: E402
from triton_host import GUARD, HostTensor, compiler_of, guarded  # noqa: E402

import pallas_kernels.sgmm.kernel_triton as kernels  # noqa: E402
from pallas_kernels.sgmm import Terms, sgmm  # noqa: E402
from pallas_kernels.sgmm.kernel_triton import Config, configure, sgmm_triton, unsupported_reason  # noqa: E402

SMALL = Config(tile_m=32, tile_n=32, tile_k=16, num_warps=4, num_stages=2)
LLAMA_8B = {"k": (1024, 4096), "down": (4096, 14336)}


def interpreted_call(*args, kernel, out_shape, grid, input_output_aliases, name, num_warps, num_stages, **constants):
    """jax_triton.triton_call, interpreted; also checks that nothing but the outputs has changed."""
    inputs, memories = zip(*map(guarded, args), strict=True)
    aliased = {output: index for index, output in input_output_aliases.items()}
    outputs = [inputs[aliased[n]] for n in range(len(out_shape))]
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in out_shape]
    before = [memory.copy() for memory in memories]
    triton_interpreter.InterpretedFunction(kernel.fn)[grid](*map(HostTensor, (*inputs, *outputs)), **constants)
    for i, (memory, old) in enumerate(zip(memories, before, strict=True)):
        if i in input_output_aliases:
            memory, old = (np.concatenate([x[:GUARD], x[-GUARD:]]) for x in (memory, old))
        assert memory.tobytes() == old.tobytes()
    return [jnp.asarray(x) for x in outputs]


@dataclass(frozen=True)
class Case:
    shapes: dict[str, tuple[int, int]]
    experts: list[int]
    coefficients: list[float]
    rank: int = 16
    num_experts: int = 4
    num_layers: int = 2

    def arrays(self, dtype, seed=0):
        """weights, a, b and terms; experts that no nonzero term names are NaN."""
        rng = np.random.default_rng(seed)
        used = {e for e, c in zip(self.experts, self.coefficients, strict=True) if c}
        unused = [e for e in range(self.num_experts) if e not in used]
        weights, a, b = {}, {}, {}
        for name, (out_dim, in_dim) in self.shapes.items():
            weights[name] = rng.normal(size=(self.num_layers, out_dim, in_dim))
            a[name] = rng.normal(size=(self.num_layers, self.num_experts, self.rank, in_dim)) / self.rank**0.5
            b[name] = rng.normal(size=(self.num_layers, self.num_experts, out_dim, self.rank))
            a[name][:, unused] = b[name][:, unused] = np.nan
        weights, a, b = jax.tree.map(lambda x: jnp.asarray(x, dtype), (weights, a, b))
        return weights, a, b, Terms(jnp.asarray(self.experts, jnp.int32), jnp.asarray(self.coefficients, jnp.float32))


def check(merged, base, a, b, terms):
    """Assert errors within half a unit in the last place of the float64 merge, and an allowance for sums in fp32."""
    used = np.asarray(terms.coefficients) != 0
    experts, coefficients = np.asarray(terms.experts)[used], np.asarray(terms.coefficients, np.float64)[used]
    assert merged.keys() == base.keys()
    for name in merged:
        w, a_, b_ = (np.asarray(x[name], np.float64) for x in (base, a, b))
        a_, b_ = a_[:, experts], b_[:, experts]
        exact = w + np.einsum("j,ljor,ljri->loi", coefficients, b_, a_)
        size = abs(w) + np.einsum("j,ljor,ljri->loi", abs(coefficients), abs(b_), abs(a_))
        error = abs(np.asarray(merged[name], np.float64) - exact)
        assert merged[name].dtype == base[name].dtype
        assert (error <= 0.501 * jnp.finfo(base[name].dtype).eps * abs(exact) + 5e-7 * size).all(), name


@pytest.fixture
def interpreter(monkeypatch):
    patch = triton_interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        """Bounds of loops are arrays of shape [1] there, of which numpy 2.5 makes no int."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", patch_index)
    monkeypatch.setattr(kernels, "_merge_tile", triton_interpreter.InterpretedFunction(kernels._merge_tile.fn))
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=interpreted_call))


CASES = {
    "one term": Case({"q": (32, 32)}, [2], [0.7]),
    "rank 8, one expert": Case({"q": (33, 40)}, [0], [-2.0], rank=8, num_experts=1),
    "ragged": Case({"q": (70, 41), "k": (9, 100), "z": (1, 7)}, [3, 1], [0.7, 0.3]),
    "rank 24": Case({"q": (40, 30), "v": (50, 65)}, [2, 0], [1.5, 0.1], rank=24),
    "rank 128": Case({"q": (33, 20)}, [15, 4], [0.7, 0.3], rank=128, num_experts=16),
    "zeros": Case({"q": (40, 30)}, [0, 1, 2, 3], [0.0, 0.2, 0.0, -0.4]),
    "zeros at the end": Case({"q": (40, 30)}, [1, 1, 0], [0.3, 0.0, 0.0]),
    "nothing": Case({"q": (40, 30), "k": (3, 3)}, [0, 1], [0.0, 0.0]),
    "repeated": Case({"q": (40, 30)}, [1, 2, 1, 1], [0.5, 0.2, -0.1, 0.3]),
    "eight terms": Case({"q": (20, 50)}, [*range(8)], [0.1] * 8, rank=12, num_experts=8),
    "seven targets": Case(
        {name: (8 + 13 * i, 70 - 9 * i) for i, name in enumerate("qkvogud")}, [0, 3, 2, 0], [0.4, 0.6, 0.0, -0.3]
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_interpreted(interpreter, case, dtype):
    """Both bases: the weights themselves, and pristine ones with weights that must not be read. bfloat16 is left out:
    Triton's interpreter multiplies its bits as integers, and truncates to it."""
    weights, a, b, terms = CASES[case].arrays(dtype)
    check(sgmm_triton(weights, a, b, terms, None, config=SMALL), weights, a, b, terms)
    poison = {name: jnp.full_like(w, jnp.nan) for name, w in weights.items()}
    check(sgmm_triton(poison, a, b, terms, weights, config=SMALL), weights, a, b, terms)


@pytest.mark.parametrize("rank", [16, 40])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32], ids=["fp16", "fp32"])
def test_default_tiles(interpreter, dtype, rank):
    case = Case({"q": (130, 70), "up": (65, 260)}, [1, 3], [0.7, 0.3], rank=rank)
    weights, a, b, terms = case.arrays(dtype)
    check(sgmm(weights, a, b, terms, implementation="triton"), weights, a, b, terms)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rank", [8, 64])
def test_compiles_without_gpu(monkeypatch, tmp_path, capability, dtype, rank):
    """Targets of an 8B model: tensor cores where there are any, 16-byte copies, nothing in local memory."""
    compiled: list[Any] = []
    monkeypatch.setitem(sys.modules, "jax_triton", compiler_of(capability, compiled))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weights, a, b = {}, {}, {}
    for target, (out_dim, in_dim) in LLAMA_8B.items():
        weights[target] = jax.ShapeDtypeStruct((32, out_dim, in_dim), dtype)
        a[target] = jax.ShapeDtypeStruct((32, 8, rank, in_dim), dtype)
        b[target] = jax.ShapeDtypeStruct((32, 8, out_dim, rank), dtype)
    terms = Terms(jax.ShapeDtypeStruct((4,), "int32"), jax.ShapeDtypeStruct((4,), "float32"))
    jax.eval_shape(partial(sgmm, implementation="triton"), weights, a, b, terms)
    ptx = compiled[0].asm["ptx"]
    products = "fma.rn.f32" if dtype == "float32" else {80: "mma.sync", 90: "wgmma.mma_async"}[capability]
    for wanted in (products, ".v4.b32 {", "st.global.v4.b32", "cp.async.cg.shared.global"):
        assert wanted in ptx, wanted
    assert ".local" not in ptx
    assert ("mma" in ptx) == (dtype != "float32")  # tf32 would lose 13 bits


def test_unsupported_reasons():
    weights, *_ = Case(dict.fromkeys("abcdefgh", (8, 8)), [0], [1.0]).arrays(jnp.float32)
    assert "8 targets" in str(unsupported_reason(weights))
    del weights["h"]
    assert unsupported_reason(weights) is None


@pytest.fixture
def launches(monkeypatch):
    """Arguments of every call of triton_call; nothing runs."""
    calls = []

    def recording_call(*args, kernel, out_shape, **launch):
        calls.append({"args": args, **launch})
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=recording_call))
    return calls


@pytest.mark.parametrize("golden", [False, True], ids=["switch", "golden"])
def test_weights_are_the_outputs(launches, golden):
    weights, a, b, terms = Case({"v": (8, 8), "k": (8, 8), "q": (8, 8)}, [0], [1.0]).arrays(jnp.float16)
    pristine = jax.tree.map(jnp.copy, weights) if golden else None
    sgmm_triton(weights, a, b, terms, pristine)
    outputs = {output: launches[0]["args"][index] for index, output in launches[0]["input_output_aliases"].items()}
    assert [outputs[i] is weights[name] for i, name in enumerate("kqv")] == [True] * 3


def test_every_field_of_config_is_read(launches):
    weights, a, b, terms = Case({"q": (64, 64)}, [0], [1.0]).arrays(jnp.float16)
    for field in (None, *Config.__slots__):
        config = replace(SMALL, **{field: 2 * getattr(SMALL, field)}) if field else SMALL
        sgmm_triton(weights, a, b, terms, None, config=config)
        del launches[-1]["args"]
    assert all(launch != launches[0] for launch in launches[1:])
    assert configure(16, 2) != configure(32, 2) != configure(32, 4)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("case", CASES)
    def test_values(self, case, dtype):
        """Values as in the interpreter, here compiled; and a second time in the same buffers."""
        weights, a, b, terms = CASES[case].arrays(dtype)
        golden = jax.jit(partial(sgmm, implementation="triton"), donate_argnums=0)
        poison = {name: jnp.full_like(w, jnp.nan) for name, w in weights.items()}
        merged = golden(poison, a, b, terms, pristine=weights)
        check(merged, weights, a, b, terms)
        once = jax.tree.map(np.asarray, merged)
        check(golden(merged, a, b, terms), once, a, b, terms)

    @pytest.mark.parametrize("rank", [8, 16, 24, 32, 64, 128])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "fp16", "fp32"])
    def test_larger(self, dtype, rank):
        shapes = {"q": (512, 512), "k": (136, 512), "up": (1000, 513), "down": (510, 1000)}
        case = Case(shapes, [3, 0, 3, 1], [0.7, 0.3, -0.6, 0.0], rank=rank, num_layers=3)
        weights, a, b, terms = case.arrays(dtype)
        check(jax.jit(partial(sgmm, implementation="triton"))(weights, a, b, terms), weights, a, b, terms)

    @pytest.mark.parametrize("golden", [False, True], ids=["switch", "golden"])
    def test_donated_buffers_are_reused(self, golden):
        weights, a, b, terms = Case({"q": (64, 64), "k": (32, 64)}, [1], [1.0]).arrays(jnp.bfloat16)
        pristine = jax.tree.map(jnp.copy, weights) if golden else None
        places = {name: w.unsafe_buffer_pointer() for name, w in weights.items()}
        merge = jax.jit(partial(sgmm, implementation="triton"), donate_argnums=0)
        merged = merge(weights, a, b, terms, pristine=pristine)
        assert {name: w.unsafe_buffer_pointer() for name, w in merged.items()} == places
        memory = merge.lower(merged, a, b, terms, pristine=pristine).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 1024
