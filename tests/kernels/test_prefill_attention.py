"""Attention of a chunk of a prompt to the cache against float64: the definition in XLA and the kernel, interpreted and
compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from pallas_kernels.prefill_attention import (
    Tiles,
    prefill_attention,
    prefill_attention_xla,
    tiles_for,
    unsupported_reason,
)

LAYER, NUM_LAYERS = 1, 2
TILES = Tiles(block_q=16, block_k=16, num_warps=4, num_stages=2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`chunks`: the cache's row, start and number of tokens of every row."""

    chunks: tuple[tuple[int, int, int], ...]
    length: int = 32
    heads: tuple[int, int, int] = (4, 2, 32)  # query, key-value, dimensions
    slots: int = 64
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    dtype: str = "float32"

    def draw(self, poison: float = np.nan) -> dict[str, Any]:
        """Arguments of the kernel. Positions that no token may see, and the other layer, are `poison`."""
        rng, (num_heads, num_kv, head_dim) = np.random.default_rng(0), self.heads
        rows, starts, lengths = (np.array(values, np.int32) for values in zip(*self.chunks, strict=True))
        q = rng.standard_normal((len(rows), self.length, num_heads, head_dim))
        caches = rng.standard_normal((2, NUM_LAYERS, max(rows) + 2, self.slots, num_kv, head_dim))
        visible = np.zeros(caches.shape[2:4], bool)
        for row, start, count in self.chunks:
            visible[row, max(0, start + 1 - (self.window or self.slots)) : start + count] = True
        caches[:, :, ~visible] = poison
        caches[:, 1 - LAYER] = poison
        arrays = {"q": q, "cache_k": caches[0], "cache_v": caches[1]}
        found: dict[str, Any] = {name: jnp.asarray(x, self.dtype) for name, x in arrays.items()}
        found |= {"layer": jnp.array([LAYER]), "rows": jnp.asarray(rows), "starts": jnp.asarray(starts)}
        windows = None if self.window is None else jnp.array([3, self.window], jnp.int32)
        return found | {
            "lengths": jnp.asarray(lengths), "windows": windows, "scale": self.scale, "softcap": self.softcap
        }  # fmt: skip


def exact(case: Case, arguments: dict[str, Any]) -> list[np.ndarray]:
    """Outputs of every row's tokens, in float64, one token after the other."""
    q, cache_k, cache_v = (np.asarray(arguments[n], np.float64) for n in ("q", "cache_k", "cache_v"))
    group = q.shape[2] // cache_k.shape[3]
    outs = []
    for i, (row, start, count) in enumerate(case.chunks):
        out = np.empty((count, *q.shape[2:]))
        for t in range(count):
            seen = slice(max(0, start + t + 1 - (case.window or case.slots)), start + t + 1)
            keys, values = (np.repeat(c[LAYER, row, seen], group, axis=1) for c in (cache_k, cache_v))  # [S, N, H]
            scores = np.einsum("nh,snh->ns", q[i, t], keys) * (case.scale or q.shape[3] ** -0.5)
            if case.softcap:
                scores = case.softcap * np.tanh(scores / case.softcap)
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[t] = np.einsum("ns,snh->nh", p / p.sum(axis=1, keepdims=True), values)
        outs.append(out)
    return outs


def check(case: Case, attend: Any, poison: float = np.nan) -> None:
    arguments = case.draw(poison)
    out = attend(**arguments)
    assert jnp.isfinite(out).all()
    tolerance = {"float32": 1e-5, "bfloat16": 2.0**-6}[case.dtype]
    for found, wanted in zip(out, exact(case, arguments), strict=True):
        np.testing.assert_allclose(np.asarray(found[: len(wanted)], np.float64), wanted, atol=tolerance, rtol=tolerance)


CASES = {
    "rows": Case(chunks=((2, 0, 32), (0, 20, 17), (3, 40, 0))),
    "a window": Case(chunks=((1, 30, 32), (0, 5, 27)), window=20, heads=(6, 2, 32)),
    "odd cache and chunk": Case(chunks=((0, 38, 33),), length=33, slots=71, heads=(3, 1, 64)),
    "soft cap, scale": Case(chunks=((0, 9, 30),), softcap=2.0, scale=0.7),
    "bfloat16": Case(chunks=((0, 17, 32), (1, 0, 3)), dtype="bfloat16"),
    "narrow window": Case(chunks=((0, 0, 32), (1, 33, 31)), window=1),
}
LARGE = {
    "7B": Case(chunks=((0, 0, 256),), length=256, heads=(32, 32, 128), slots=512, dtype="bfloat16"),
    "grouped, behind a prefix": Case(
        chunks=((1, 700, 200), (0, 511, 256)), length=256, heads=(32, 8, 128), slots=1024, dtype="bfloat16"
    ),
    "wide heads, soft cap": Case(
        chunks=((0, 300, 128),), length=128, heads=(8, 4, 256), slots=512, softcap=5.0, dtype="bfloat16"
    ),
    "many rows, window": Case(
        chunks=tuple((i, 13 * i, 64 - i) for i in range(16)), length=64, heads=(9, 3, 64), slots=512, window=50,
        dtype="bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_definition(case):
    """Unseen positions are large rather than NaN: the definition multiplies them by 0."""
    check(CASES[case], prefill_attention_xla, poison=1e3)


@pytest.mark.parametrize("case", quick.first(CASES, 4))
def test_interpreted(case):
    """By short blocks, several of which a program has."""
    check(CASES[case], partial(prefill_attention, tiles=TILES, interpret=True))


@pytest.mark.slow
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 32), (32, 16), (64, 64)])
def test_tiles(block_q, block_k):
    tiles = replace(TILES, block_q=block_q, block_k=block_k)
    for case in ("rows", "a window"):
        check(CASES[case], partial(prefill_attention, tiles=tiles, interpret=True))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_compiled(case):
    check(replace((CASES | LARGE)[case], dtype="bfloat16"), prefill_attention)


def test_default_tiles():
    assert tiles_for(2048, 256, "9.0") == Tiles(block_q=128, block_k=64, num_warps=4, num_stages=3)
    assert (
        tiles_for(2048, 256, "12.0") == tiles_for(2048, 256, "") == replace(TILES, block_q=128, block_k=64, num_warps=8)
    )
    assert tiles_for(16, 256, "9.0").block_q == 16
    assert tiles_for(100, 256, "8.0").block_q == 128
    assert tiles_for(2048, 512, "9.0").block_k < tiles_for(2048, 256, "9.0").block_k


def test_unsupported_reasons():
    assert unsupported_reason(128, jnp.dtype("bfloat16")) is None
    assert "float32" in str(unsupported_reason(128, jnp.dtype("float32")))
    for head_dim in (16, 48, 512):
        assert f"heads have {head_dim} dimensions" in str(unsupported_reason(head_dim, jnp.dtype("float16")))
