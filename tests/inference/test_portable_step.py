"""The decode step in five launches a layer, against the model's own modules in fp32: interpreted here, compiled with
`-m gpu`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from fused_cases import Case, by_modules, in_fp32, make

from adafuse_jax.inference.backends.portable import portable_step
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.kv_cache import KVCache

SMALL = Case(num_layers=2, slots=64, position=40, embed_dim=96, hidden_dim=160, heads=(4, 2, 32), vocab_size=250, rank=8)
CASES = {
    "all 7": replace(SMALL, targets=LINEARS),
    "rows": replace(SMALL, targets=LINEARS, batch=3),
    "biases, norms of q and k, a window": replace(
        SMALL, targets=("o_proj", "up_proj"), batch=2, bias=True, qk_norm=True, window=8
    ),
    "bare, tied": replace(SMALL, tied=True, bias=True),
    "first position": replace(SMALL, targets=("k_proj",), position=0),
}
COMPILED = {
    "token": Case(num_layers=3, embed_dim=1024, hidden_dim=2816, heads=(8, 8, 128), vocab_size=4096, targets=LINEARS),
    "grouped queries, long": Case(
        num_layers=2, embed_dim=576, hidden_dim=1536, heads=(9, 3, 64), slots=4096, position=3900, targets=("q_proj", "v_proj")
    ),
    "32 rows": Case(num_layers=2, embed_dim=1024, hidden_dim=2816, heads=(8, 2, 128), batch=32, slots=512, position=500,
                    targets=LINEARS, num_experts=8),
    "20 rows, biases": replace(
        CASES["biases, norms of q and k, a window"], batch=20, slots=256, position=200, embed_dim=1000, hidden_dim=1400
    ),
}  # fmt: skip


def check(case: Case, dtype: str, tolerance: float, **options: Any) -> None:
    """Logits and what is written into the cache; the rest of the cache is NaN where no token may look."""
    model, adapter, cache, tokens, positions = make(case)
    exact = in_fp32((model, adapter, cache))
    wanted, routing, wanted_cache = jax.jit(by_modules)(*exact, tokens, positions)
    if dtype == "float32":
        model, adapter, cache = exact
    ahead = jnp.arange(case.slots)[None] > positions[:, None]
    if case.window:
        ahead |= jnp.arange(case.slots)[None] <= positions[:, None] - case.window
    ahead = ahead[None, :, :, None, None]
    if case.targets and case.targets[0] == "o_proj":  # layer 0 runs in XLA before the router, and multiplies all by 0
        ahead &= False
    cache = KVCache(*(jnp.where(ahead, jnp.nan, x) for x in (cache.k, cache.v)))
    logits, experts, found = jax.jit(partial(portable_step, **options))(model, adapter, tokens, positions, cache)
    assert np.linalg.norm(logits - wanted) < tolerance * np.linalg.norm(wanted)
    for x, y in ((found.k, wanted_cache.k), (found.v, wanted_cache.v)):
        seen, y = np.asarray(jnp.where(ahead, 0, x), np.float64), np.asarray(jnp.where(ahead, 0, y), np.float64)
        np.testing.assert_allclose(seen, y, atol=4 * tolerance * abs(y).max(), rtol=0)
        assert jnp.isnan(jnp.where(ahead, x, jnp.nan)).all()
    if adapter is None:
        assert experts is None
    else:
        np.testing.assert_array_equal(experts, routing.experts[:, 0])


@pytest.mark.parametrize("case", quick.first(CASES, 2))
def test_interpreted(case):
    check(CASES[case], "float32", 1e-5, interpret=True)


def test_interpreted_in_bfloat16():
    check(replace(CASES["rows"], batch=2, num_layers=1), "bfloat16", 2e-2, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("case", [*CASES, *COMPILED])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled(case, dtype):
    with jax.default_matmul_precision("highest"):
        check((CASES | COMPILED)[case], dtype, 2e-2 if dtype == "bfloat16" else 1e-5)
