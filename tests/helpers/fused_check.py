"""One step of the megakernel against the model's own modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from fused_cases import Case, by_modules, in_fp32, make

from adafuse_jax.inference.backends.megakernel import Fused, fused_step
from adafuse_jax.parallel.mesh import make_mesh, place_state, shard

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 12) or jax.default_backend() != "cpu",
    reason="the interpreter runs on CPUs; before JAX 0.12 it fails unless every warpgroup sees a barrier's last phase",
)
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


def check(case: Case, *, compiled: bool, devices: int = 1, **options: Any) -> None:
    """The errors against the fp32 modules are those of the bfloat16 modules, give or take one draw of their roundings, and
    the experts are the same. `devices` that share the model."""
    model, adapter, cache, tokens, positions = make(case)
    exact, _, exact_cache = by_modules(in_fp32(model), in_fp32(adapter), in_fp32(cache), tokens, positions)
    usual, routing, usual_cache = by_modules(model, adapter, cache, tokens, positions)
    step = partial(fused_step, **options)
    call: Any = jax.jit(step) if compiled else step
    before = cache
    if devices > 1:
        mesh = make_mesh(devices, model.config)
        model, adapter, before = shard(model, mesh), adapter and shard(adapter, mesh), place_state(cache, mesh)
    logits, experts, after = call(model, adapter, Fused.of(model, adapter), tokens, positions, before)
    first, *others = (np.asarray(part.data) for part in logits.addressable_shards)
    for other in others:
        np.testing.assert_array_equal(other, first)

    def error(x: Any, wanted: Any) -> float:
        x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
        return float(np.linalg.norm(x - wanted) / np.linalg.norm(wanted))

    assert error(logits, exact) <= 1.5 * error(usual, exact)
    rows = np.arange(case.batch), positions
    for name in ("k", "v"):
        new, wanted, other = (np.asarray(getattr(c, name))[:, *rows] for c in (after, exact_cache, usual_cache))
        assert error(new, wanted) <= 1.5 * error(other, wanted) + 2e-3
        untouched = np.asarray(getattr(after, name)).copy()
        untouched[:, *rows] = np.asarray(getattr(cache, name))[:, *rows]
        np.testing.assert_array_equal(untouched, np.asarray(getattr(cache, name)))
    if adapter is not None:
        np.testing.assert_array_equal(experts.experts, routing.experts[:, 0])
