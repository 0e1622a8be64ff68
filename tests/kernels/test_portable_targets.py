"""The kernels of the portable decode step, compiled for other GPUs by the triton package: they need none.

An A100 is sm_80, an RTX 4090 or L40S sm_89, an H100 sm_90, a B200 sm_100, an RTX 5090 sm_120.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton")

from triton_compiler import SHARED_MEMORY, Kernel, kernel_of

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.pregated_linear import Group, Mixture, pregated_linear, tiles_for
from pallas_kernels.quantised import INT4, INT4_G64, INT8, QuantLayout, quantise

LAYERS = 2
of = jax.ShapeDtypeStruct


def linears(
    batch: int,
    outs: dict[str, int],
    in_dim: int,
    dtype: str,
    rank: int = 64,
    gated: bool = False,
    activation: str = "silu",
    norm_dtype: str | None = None,
    layout: QuantLayout | None = None,
) -> Kernel:
    """All of them with 8 experts, quantised with a `layout`; one row with a norm in front."""
    a = {name: of((LAYERS, 8, rank, in_dim), dtype) for name in outs}
    b = {name: of((LAYERS, 8, out, rank), dtype) for name, out in outs.items()}
    used = min(8, 2 * batch)
    mixture = Mixture(of((used,), "int32"), of((used, batch), "float32"))
    names = tuple(outs) if gated else None
    tiles = tiles_for(batch, [*outs.values()], in_dim, jnp.dtype(dtype).itemsize, gated, layout)
    group = Group(
        tiles=tiles, out_dtype=jnp.dtype(dtype), gated=names, activation=activation, eps=1e-5,  # type: ignore[arg-type]
    )  # fmt: skip
    weights: dict[str, Any] = {name: of((LAYERS, out, in_dim), dtype) for name, out in outs.items()}
    if layout is not None:
        weights = {name: jax.eval_shape(lambda w: quantise(w, layout, dtype), w) for name, w in weights.items()}
    one, norm = of((1,), "int32"), of((LAYERS, in_dim), norm_dtype or dtype) if batch == 1 else None
    return kernel_of(
        lambda *operands: pregated_linear(*operands[:-1], group=group, norm=operands[-1]),
        of((batch, in_dim), dtype), weights, a, b, mixture, one, one, of((LAYERS,), "int32"), norm,
    )  # fmt: skip


def attention(batch: int, heads: tuple[int, int, int], slots: int, dtype: str, **options: float) -> Kernel:
    num_heads, num_kv, head_dim = heads
    new, cached = of((batch, num_kv, head_dim), dtype), of((LAYERS, batch, slots, num_kv, head_dim), dtype)
    angles = of((batch, head_dim // 2), "float32")
    return kernel_of(
        partial(decode_attention, **options), of((batch, num_heads, head_dim), dtype), new, new, cached, cached,
        of((1,), "int32"),
        of((batch,), "int32"), angles, angles, of((LAYERS,), "int32"), of((batch, num_kv), "int32"),
    )  # fmt: skip


GATE_UP_7B, GATE_UP_SMOL = {"gate": 11008, "up": 11008}, {"gate": 1536, "up": 1536}
KERNELS: dict[str, Callable[[], Kernel]] = {
    "7B gate, up": lambda: linears(1, GATE_UP_7B, 4096, "bfloat16", gated=True),
    "7B gate, up, 32 rows": lambda: linears(32, GATE_UP_7B, 4096, "bfloat16", gated=True),
    "7B attention": lambda: attention(1, (32, 32, 128), 512, "bfloat16"),
    "GeGLU behind a norm in float32": lambda: linears(
        1, {"gate": 2048, "up": 2048}, 640, "bfloat16", gated=True, activation="gelu_pytorch_tanh", norm_dtype="float32"
    ),
    "wide heads, a soft cap": lambda: attention(1, (8, 4, 256), 512, "bfloat16", scale=0.0625, softcap=50.0),
    "small q, k, v": lambda: linears(1, {"q": 576, "k": 192, "v": 192}, 576, "float32", rank=16),
    "small gate, up, 8 rows": lambda: linears(8, GATE_UP_SMOL, 576, "float32", rank=16, gated=True),
    "small attention, 32 rows": lambda: attention(32, (9, 3, 64), 512, "float16"),
    "largest rank, 32 rows": lambda: linears(32, GATE_UP_7B, 4096, "float16", rank=256, gated=True),
    "7B down, 32 rows": lambda: linears(32, {"down": 4096}, 11008, "bfloat16"),
    "7B q, k, v, 32 rows": lambda: linears(32, dict.fromkeys("qkv", 4096), 4096, "bfloat16"),
    "widest heads, 32 rows": lambda: attention(32, (8, 4, 256), 512, "float32"),
    "7B gate, up, int4": lambda: linears(1, GATE_UP_7B, 4096, "bfloat16", gated=True, layout=INT4),
    "7B gate, up, int4, 32 rows": lambda: linears(32, GATE_UP_7B, 4096, "bfloat16", gated=True, layout=INT4),
    "7B down, int8": lambda: linears(1, {"down": 4096}, 11008, "bfloat16", layout=INT8),
    "7B down, int8, 32 rows": lambda: linears(32, {"down": 4096}, 11008, "bfloat16", layout=INT8),
    "small gate, up, int4, 8 rows": lambda: linears(8, GATE_UP_SMOL, 576, "float32", 16, gated=True, layout=INT4_G64),
}
EVERYWHERE, FEATURES, ONCE = (
    [*KERNELS][:3],
    ("GeGLU behind a norm in float32", "wide heads, a soft cap", "7B q, k, v, 32 rows"),
    [*[*KERNELS][5:8], "7B down, 32 rows", *[*KERNELS][-5:-1]],
)
QUICK = [(name, c) for name in EVERYWHERE for c in SHARED_MEMORY] + [(name, 120) for name in ONCE]
SLOW = [(name, c) for name in KERNELS if name not in FEATURES for c in SHARED_MEMORY if (name, c) not in QUICK]
SLOW += [(name, 89) for name in FEATURES]


@cache
def kernel(name: str) -> Kernel:
    return KERNELS[name]()


@pytest.mark.parametrize(
    ("name", "capability"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_compiles(monkeypatch, tmp_path, name, capability):
    """To machine code that fits: nothing in local memory, wide loads, tensor cores for 16-bit products of rows."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = kernel(name).compile(capability, tmp_path)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert ".local" not in ptx
    is_16_bit = not name.startswith(("small q", "small gate", "widest"))
    is_vector = name in ("7B gate, up", "GeGLU behind a norm in float32", "7B gate, up, int4", "7B down, int8")
    assert ("mma" in ptx) == (is_16_bit and not is_vector)  # tf32 would lose 13 bits
    assert "atom.global.gpu.acq_rel.add" in ptx  # what one program publishes, another sees
    assert "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx
