"""The kernels of prefill, compiled for other GPUs by the triton package: they need none.

An A100 is sm_80, an RTX 4090 or L40S sm_89, an H100 sm_90, a B200 sm_100, an RTX 5090 sm_120.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax
import pytest

pytest.importorskip("triton")

from triton_compiler import SHARED_MEMORY, Kernel, kernel_of

from pallas_kernels.prefill_attention import prefill_attention, tiles_for
from pallas_kernels.prompt_experts import expand, expand_gated, expand_into, pair_tokens, shrink

LAYERS = 2
of, ints = jax.ShapeDtypeStruct, partial(jax.ShapeDtypeStruct, dtype="int32")


def attention(
    length: int,
    heads: tuple[int, int, int],
    dtype: str,
    capability: int,
    *,
    windows: bool = False,
    softcap: float | None = None,
) -> Kernel:
    num_heads, num_kv, head_dim = heads
    tiles = tiles_for(length, 2 * head_dim, f"{capability / 10}")
    cached = of((LAYERS, 2, 4096, num_kv, head_dim), dtype)
    attend = partial(prefill_attention, softcap=softcap, tiles=tiles)
    return kernel_of(
        attend, of((1, length, num_heads, head_dim), dtype), cached, cached, ints((1,)),
        ints((1,)), ints((1,)), ints((1,)), ints((LAYERS,)) if windows else None,
    )  # fmt: skip


def experts(name: str, tokens: int, num_experts: int, rank: int, widths: tuple[int, int], linears: int) -> Kernel:
    into, out = widths
    pair = partial(pair_tokens, num_experts=num_experts, scale=1.0)
    pairs = jax.eval_shape(pair, ints((tokens, 2)), of((tokens, 2), "float32"))
    if name == "shrink":
        factors = [of((LAYERS, num_experts, rank, into), "bfloat16")] * linears
        return kernel_of(shrink, of((tokens, into), "bfloat16"), factors, ints((1,)), pairs)
    if name == "gated":
        h, b = of((2, *pairs.token.shape, rank), "bfloat16"), [of((LAYERS, num_experts, out, rank), "bfloat16")] * 2
        y = of((tokens, out), "bfloat16")
        return kernel_of(expand_gated, y, y, h, b, ints((1,)), pairs)
    h, b = of((linears, *pairs.token.shape, rank), "bfloat16"), of((LAYERS, num_experts, out, rank), "bfloat16")
    if name == "expand":
        return kernel_of(expand, h, b, ints((1,)), pairs)
    return kernel_of(expand_into, of((tokens, out), "bfloat16"), h, b, ints((1,)), pairs)


KERNELS: dict[str, Callable[[int], Kernel]] = {
    "7B attention": lambda c: attention(2048, (32, 32, 128), "bfloat16", c),
    "7B shrink": lambda _: experts("shrink", 2048, 8, 64, (4096, 4096), 3),
    "7B gate, up": lambda _: experts("gated", 2048, 8, 64, (4096, 11008), 2),
    "7B expand": lambda _: experts("expand", 2048, 8, 64, (4096, 4096), 3),
    "7B expand into": lambda _: experts("expand into", 2048, 8, 64, (4096, 4096), 1),
    "wide heads, windows, soft cap": lambda c: attention(512, (16, 8, 256), "bfloat16", c, windows=True, softcap=50.0),
    "small attention": lambda c: attention(64, (9, 3, 64), "float16", c, windows=True),
    "largest rank, shrink": lambda _: experts("shrink", 512, 4, 128, (4096, 4096), 1),
    "largest rank, gated": lambda _: experts("gated", 512, 4, 128, (4096, 4096), 2),
    "largest rank, expand into": lambda _: experts("expand into", 512, 4, 128, (4096, 4096), 2),
}
QUICK = [("7B attention", c) for c in SHARED_MEMORY] + [(name, 120) for name in [*KERNELS][1:6]]
SLOW = [(name, c) for name in KERNELS for c in SHARED_MEMORY if (name, c) not in QUICK]


@cache
def kernel(name: str, capability: int) -> Kernel:
    return KERNELS[name](capability)


@pytest.mark.parametrize(
    ("name", "capability"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_compiles(monkeypatch, tmp_path, name, capability):
    """To machine code that fits: nothing in local memory, products on tensor cores, wide loads that are pipelined."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = kernel(name, capability).compile(capability, tmp_path)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert ".local" not in ptx
    assert "mma" in ptx
    assert "cp.async.cg.shared.global" in ptx
