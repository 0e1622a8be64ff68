"""One token's attention to its cache against float64: the definition in XLA and the kernel, interpreted and compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from pallas_kernels.decode_attention import decode_attention, decode_attention_xla, unsupported_reason
from pallas_kernels.decode_attention.kernel_triton import Tiles, tiles_for

EPS = 1e-5
LAYER, NUM_LAYERS = 1, 2
NO_WINDOW = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    positions: tuple[int, ...]
    heads: tuple[int, int, int] = (4, 2, 32)  # query, key-value, dimensions
    slots: int = 64
    window: int = NO_WINDOW
    qk_norm: bool = False
    dtype: str = "float32"

    def draw(self, poison: float = np.nan) -> dict[str, Any]:
        """Arguments of the kernel. Positions that a token may not see, and the other layer, are `poison`."""
        rng, batch, (num_heads, num_kv, head_dim) = np.random.default_rng(0), len(self.positions), self.heads
        position = np.array(self.positions, np.int32)
        q, k, v = (rng.standard_normal((batch, n, head_dim)) for n in (num_heads, num_kv, num_kv))
        caches = rng.standard_normal((2, NUM_LAYERS, batch, self.slots, num_kv, head_dim))
        distance = position[:, None] - np.arange(self.slots)
        caches[:, :, (distance <= 0) | (distance >= self.window)] = poison
        caches[:, 1 - LAYER] = poison
        angles = np.outer(position, np.linspace(0.01, 1, head_dim // 2))
        norms = 1 + 0.2 * rng.standard_normal((2, NUM_LAYERS, head_dim)) if self.qk_norm else (None, None)
        arrays = {"q": q, "k": k, "v": v, "cache_k": caches[0], "cache_v": caches[1]}
        arrays |= {"q_norm": norms[0], "k_norm": norms[1]}
        arrays = {name: None if x is None else jnp.asarray(x, self.dtype) for name, x in arrays.items()}
        return arrays | {
            "layer": jnp.array([LAYER]), "position": jnp.asarray(position), "eps": EPS, "cos": jnp.cos(angles),
            "sin": jnp.sin(angles), "windows": jnp.array([3, self.window], jnp.int32),
        }  # fmt: skip


def exact(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, keys and values of the tokens as they are cached), in float64."""
    found = {name: np.asarray(x, np.float64) for name, x in arguments.items() if name in {"q", "k", "v", "cos", "sin"}}

    def rotated(name: str) -> np.ndarray:
        x, norm = found[name], arguments[f"{name}_norm"]
        if norm is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * np.asarray(norm[LAYER], np.float64)
        first, second = np.split(x, 2, axis=-1)
        cos, sin = found["cos"][:, None], found["sin"][:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q, k, v, outs = rotated("q"), rotated("k"), found["v"], []
    for row, position in enumerate(np.asarray(arguments["position"])):
        begin = max(0, position + 1 - int(arguments["windows"][LAYER]))
        old_k, old_v = (
            np.asarray(arguments[n][LAYER, row, begin:position], np.float64) for n in ("cache_k", "cache_v")
        )
        keys, values = np.concatenate([old_k, k[row][None]]), np.concatenate([old_v, v[row][None]])  # [S, K, H]
        group = q.shape[1] // k.shape[1]
        keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
        scores = np.einsum("nh,snh->ns", q[row], keys) / np.sqrt(q.shape[2])
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        outs.append(np.einsum("ns,snh->nh", p / p.sum(axis=1, keepdims=True), values))
    return np.stack(outs), k, v


def check(case: Case, attend: Any, poison: float = np.nan) -> None:
    arguments = case.draw(poison)
    wanted, k, v = exact(arguments)
    out, *caches = attend(**arguments)
    tolerance = {"float32": 1e-5, "bfloat16": 2.0**-6}[case.dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=tolerance, rtol=tolerance)
    for old, new, written in zip((arguments["cache_k"], arguments["cache_v"]), caches, (k, v), strict=True):
        at = LAYER, np.arange(len(case.positions)), np.array(case.positions)
        np.testing.assert_allclose(np.asarray(new[at], np.float64), written, atol=tolerance, rtol=tolerance)
        new, old = (x.at[at].set(0).astype(jnp.float32) for x in (new, old))
        np.testing.assert_array_equal(new, old)


def by_kernel(tiles: Tiles | None = None, interpret: bool = False, **arguments: Any) -> tuple[Any, Any, Any]:
    """The kernel, twice: what it counts must be 0 again for the next launch."""
    call = partial(decode_attention, **arguments, tiles=tiles, interpret=interpret)
    *first, ended = call(ended=jnp.zeros(arguments["k"].shape[:2], jnp.int32))
    *again, ended = call(ended=ended)
    assert not ended.any()
    np.testing.assert_array_equal(first[0], again[0])
    return tuple(first)


CASES = {
    "rows": Case(positions=(40, 0, 63)),
    "a window, norms": Case(positions=(50, 5), window=20, qk_norm=True, heads=(6, 2, 32)),
    "one block": Case(positions=(7,), heads=(3, 1, 64)),
    "bfloat16": Case(positions=(33, 18), dtype="bfloat16", qk_norm=True),
    "odd cache": Case(positions=(70, 31), slots=71),
}
LARGE = {
    "7B": Case(positions=(200,), heads=(32, 32, 128), slots=512, dtype="bfloat16"),
    "grouped, long": Case(positions=(4000, 100, 4095), heads=(32, 8, 128), slots=4096, dtype="bfloat16"),
    "wide heads, fp32": Case(positions=(*range(100, 132),), heads=(8, 4, 256), slots=256),
    "32 rows, window": Case(positions=(*range(90, 122),), heads=(9, 3, 64), slots=256, window=50, dtype="bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
def test_definition(case):
    """Unseen positions are large rather than NaN: the definition multiplies them by 0."""
    check(CASES[case], decode_attention_xla, poison=1e3)


@pytest.mark.parametrize("case", quick.first(CASES, 2))
def test_interpreted(case):
    """By short blocks, several of which a program has, and several programs."""
    tiles = Tiles(max_splits=2, block=16)
    check(CASES[case], partial(by_kernel, tiles=tiles, interpret=True))


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 4])
def test_number_of_programs(splits):
    check(CASES["rows"], partial(by_kernel, tiles=Tiles(max_splits=splits, block=16), interpret=True))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_compiled(case):
    check((CASES | LARGE)[case], by_kernel)


def test_past_the_end():
    """A slot that waits has a position beyond its cache: nothing is written, and its output is finite."""
    case = Case(positions=(16, 3), slots=16)
    arguments = case.draw()
    arguments["cache_k"], arguments["cache_v"] = (jnp.nan_to_num(arguments[n], nan=1.0) for n in ("cache_k", "cache_v"))
    out, cache_k, cache_v = by_kernel(**arguments, tiles=Tiles(max_splits=1, block=16), interpret=True)
    assert jnp.isfinite(out).all()
    for new, old in ((cache_k, arguments["cache_k"]), (cache_v, arguments["cache_v"])):
        np.testing.assert_array_equal(new[:, 0], old[:, 0])


def test_default_tiles():
    assert tiles_for(1, 32, 512, 256).max_splits == 16
    assert tiles_for(32, 32, 512, 256).max_splits == 1
    assert tiles_for(1, 1, 10**6, 256).max_splits == 64
    assert tiles_for(32, 8, 16, 256).max_splits == 1
    assert tiles_for(32, 8, 512, 1024).block < tiles_for(32, 8, 512, 512).block


def test_unsupported_reasons():
    assert unsupported_reason(128) is None
    for head_dim in (16, 48, 512):
        assert f"heads have {head_dim} dimensions" in str(unsupported_reason(head_dim))


def test_vmap_is_refused():
    arguments = replace(CASES["one block"], heads=(2, 1, 32)).draw()
    q = jnp.stack([arguments.pop("q")] * 2)
    with pytest.raises(NotImplementedError, match="not under vmap"):
        jax.vmap(lambda q: by_kernel(q=q, **arguments, interpret=True)[0])(q)
