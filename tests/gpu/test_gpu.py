"""Tests that need a GPU: `pytest -m gpu tests/gpu/test_gpu.py`. Elsewhere these tests are skipped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafuse_jax.models.attention import Visibility, attention, implementation_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")]


def exact_attention(q, k, v, mask):
    """float64 on the host."""
    q, k, v, mask = (np.asarray(x, np.float64) for x in (q, k, v, mask))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask[:, None] > 0, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    return np.einsum("bnts,bsnh->btnh", p / np.maximum(p.sum(-1, keepdims=True), 1e-30), v)


class TestAttention:
    """Values and gradients of every implementation, against float64 and float32."""

    @pytest.mark.parametrize(
        ("implementation", "segments", "window", "length"),
        [
            ("cudnn_causal", 1, None, 200), ("cudnn_causal", 1, 20, 200), ("xla", 1, None, 201),
            ("cudnn_packed", 3, None, 200), ("cudnn_packed", 3, None, 64), ("cudnn_packed", 5, None, 202),
            ("cudnn_masked", None, None, 200), ("cudnn_masked", None, 20, 64), ("cudnn_masked", 3, 20, 200),
            ("xla", None, None, 201), ("xla", None, 20, 201),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (9, 3, 64)])
    def test_values_and_gradients(self, heads, implementation, segments, window, length):
        """Rows of two segments and padding; with one segment, padding at the end of the second row."""
        n, kv, h = heads
        keys = jax.random.split(jax.random.key(0), 4)
        q = jax.random.normal(keys[0], (2, length, n, h), jnp.bfloat16)
        k, v = (jax.random.normal(key, (2, length, kv, h), jnp.bfloat16) for key in keys[1:3])
        at = jnp.arange(length)
        if segments == 1:
            ids = jnp.stack([jnp.ones_like(at), (at < length - 11).astype(jnp.int32)])
        else:
            ids = jnp.stack([jnp.minimum(at // (length // 3) + 1, 3) % 3, (at < length - 5).astype(jnp.int32)])
        visibility = Visibility.of_sequence(length, ids, segments)
        assert implementation_of(q, k, visibility, window) == implementation
        real = (ids > 0)[:, :, None, None]
        mask = visibility.mask(window)
        out = jax.jit(attention, static_argnames="window")(q, k, v, visibility, window=window)
        assert jnp.isfinite(out).all()
        exact = exact_attention(q, k, v, mask)
        error = np.where(real, np.asarray(out, np.float64) - exact, 0)
        assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(exact)

        weight = jax.random.normal(keys[3], q.shape, jnp.float32) * real

        def loss(attend, *qkv):
            return jnp.sum(attend(*qkv).astype(jnp.float32) * weight)

        def by_xla(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")

        full = tuple(x.astype(jnp.float32) for x in (q, k, v))
        with jax.default_matmul_precision("highest"):
            wanted = jax.grad(lambda *qkv: loss(by_xla, *qkv), argnums=(0, 1, 2))(*full)
        by_us = lambda *qkv: attention(*qkv, visibility, window)  # noqa: E731
        found = jax.jit(jax.grad(lambda *qkv: loss(by_us, *qkv), argnums=(0, 1, 2)))(q, k, v)
        for a, b in zip(found, wanted, strict=True):
            assert jnp.isfinite(a).all()
            assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 2e-2 * jnp.linalg.norm(b)
