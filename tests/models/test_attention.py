"""Attention on the CPU against float64, the choice of an implementation, and layers of different windows.

The implementations of GPUs are tested in tests/gpu/test_gpu.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from random_models import random_adapter, tokens_of

from adafuse_jax.models import attention as module
from adafuse_jax.models.attention import Visibility, attention, implementation_of, segments
from adafuse_jax.training.replicas import replica_attention

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1]])


def exact(q, k, v, seen, scale=None, softcap=np.inf):
    """softmax(cap(scale · q kᵀ)) v in float64, a key for each query from a table of what it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys, head = np.flatnonzero(seen[b, t]), n // (q.shape[2] // k.shape[2])
        scores = k[b, keys, head] @ q[b, t, n] * (q.shape[3] ** -0.5 if scale is None else scale)
        scores = scores if softcap == np.inf else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, head] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("segmented", [False, True])
def test_values(segmented: bool, window: int | None):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 8, 4, 6))
    k, v = (jax.random.normal(key, (3, 8, 2, 6)) for key in keys[1:])
    ids = SEGMENTS if segmented else np.ones_like(SEGMENTS)
    seen = np.array([
        [[s <= t and t - s < (window or 8) and row[s] == row[t] for s in range(8)] for t in range(8)] for row in ids
    ])  # fmt: skip
    visibility = Visibility.of_sequence(8, jnp.asarray(ids) if segmented else None)
    np.testing.assert_allclose(attention(q, k, v, visibility, window), exact(q, k, v, seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"scale": 0.9}, {"softcap": 0.7}, {"scale": 0.9, "softcap": 0.7}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_scale_and_soft_cap(options: dict[str, float], dtype: str, tolerance: float):
    """Also of replicas, and where padding sees no key."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = (2 * jax.random.normal(keys[0], (3, 8, 4, 6))).astype(dtype)
    k, v = (jax.random.normal(key, (3, 8, 2, 6)).astype(dtype) for key in keys[1:])
    seen = np.array([[[s <= t and t - s < 3 for s in range(8)] for t in range(8)]] * 3)
    wanted, visibility = exact(q, k, v, seen, **options), Visibility.of_sequence(8)
    found = attention(q, k, v, visibility, 3, **options)
    assert found.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    mapped = jax.vmap(lambda q, k, v: replica_attention(q[None], k[None], v[None], visibility, 3, **options)[0])
    np.testing.assert_allclose(np.float32(mapped(q, k, v)), np.float32(found), atol=tolerance)
    unseen = attention(q, k, v, Visibility.of_cache(jnp.full((3, 8), -1), 8), **options)
    assert jnp.isfinite(unseen).all()


def test_segments_are_runs_of_equal_ids():
    lengths, starts = segments(jnp.asarray(SEGMENTS), 4)
    np.testing.assert_array_equal(lengths, [[3, 4, 1, -1], [1, 5, 2, -1], [8, -1, -1, -1]])
    np.testing.assert_array_equal(starts, [[0, 3, 7, -1, -1], [0, 1, 6, -1, -1], [0, -1, -1, -1, -1]])


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        ("cudnn_packed", {}),
        ("cudnn_causal", {"max_segments": 1}),
        ("cudnn_causal", {"segmented": False, "max_segments": None}),
        ("cudnn_causal", {"max_segments": 1, "window": 8}),
        ("cudnn_masked", {"max_segments": None}),
        ("cudnn_masked", {"max_segments": 65}),
        ("cudnn_masked", {"window": 8}),
        ("cudnn_masked", {"hopper": False}),
        ("xla", {"dtype": jnp.float32}),
        ("xla", {"length": 63}),
        ("xla", {"head_dim": 136}),
        ("xla", {"head_dim": 12}),
        ("xla", {"backend": "cpu"}),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, wanted: str, change: dict):
    case = {
        "max_segments": 4, "segmented": True, "window": None, "hopper": True, "dtype": jnp.bfloat16, "length": 64,
        "head_dim": 64, "backend": "gpu",
    } | change  # fmt: skip
    monkeypatch.setattr(jax, "default_backend", lambda: case["backend"])
    monkeypatch.setattr(module, "is_hopper", lambda: case["hopper"])
    q = ShapeDtypeStruct((2, case["length"], 4, case["head_dim"]), case["dtype"])
    ids = jnp.ones((2, case["length"]), jnp.int32) if case["segmented"] else None
    visibility = Visibility.of_sequence(case["length"], ids, case["max_segments"])
    assert implementation_of(q, q, visibility, case["window"]) == wanted


def test_a_query_alone_is_xlas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k = (ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16) for length in (1, 64))
    assert implementation_of(q, k, Visibility.of_cache(jnp.zeros((2, 1), jnp.int32), 64)) == "xla"


@pytest.mark.parametrize("name", ["qwen2_window", "mistral_window"])
def test_layers_of_different_windows(models, name: str):
    """A scan, which chooses a layer's window while it runs, against unrolled layers, whose windows are constants."""
    model = models(name)
    adapter, tokens = random_adapter(model.config, targets=("q_proj",)), tokens_of(model)
    scanned, unrolled = (model(tokens, adapter=adapter, unroll=unroll).logits for unroll in (False, True))
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-4, atol=1e-5)
