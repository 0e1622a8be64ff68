"""Tests that need a GPU: `pytest -m gpu tests/gpu/test_gpu.py`. Elsewhere these tests are skipped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafuse_jax.models.attention import Visibility, attention, flash_attention_fits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")]


def exact_attention(q, k, v, mask):
    """float64 on the host."""
    q, k, v, mask = (np.asarray(x, np.float64) for x in (q, k, v, mask))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask[:, None] > 0, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    return np.einsum("bnts,bsnh->btnh", p / np.maximum(p.sum(-1, keepdims=True), 1e-30), v)


class TestFlashAttention:
    @pytest.mark.parametrize("window", [None, 20])
    @pytest.mark.parametrize("length", [64, 200, 201])
    @pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (9, 3, 64)])
    def test_values_and_gradients(self, heads, length, window):
        """Two segments and padding in each row: near float64 where there is something to see, finite everywhere."""
        n, kv, h = heads
        keys = jax.random.split(jax.random.key(0), 4)
        q = jax.random.normal(keys[0], (2, length, n, h), jnp.bfloat16)
        k, v = (jax.random.normal(key, (2, length, kv, h), jnp.bfloat16) for key in keys[1:3])
        segments = jnp.minimum(jnp.arange(length) // (length // 3) + 1, 3)[None].repeat(2, 0) % 3
        mask = Visibility.of_sequence(length, segments).mask(None if window is None else jnp.int32(window))
        assert flash_attention_fits(q, k) == (length % 2 == 0)
        out = jax.jit(attention)(q, k, v, mask)
        exact = exact_attention(q, k, v, mask)
        assert np.linalg.norm(np.asarray(out, np.float64) - exact) < 1e-2 * np.linalg.norm(exact)

        weight = jax.random.normal(keys[3], q.shape, jnp.float32)

        def loss(attend, *qkv):
            return jnp.sum(attend(*qkv, mask).astype(jnp.float32) * weight)

        def by_xla(q, k, v, mask):
            return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")

        full = tuple(x.astype(jnp.float32) for x in (q, k, v))
        with jax.default_matmul_precision("highest"):
            wanted = jax.grad(lambda *qkv: loss(by_xla, *qkv), argnums=(0, 1, 2))(*full)
        found = jax.jit(jax.grad(lambda *qkv: loss(attention, *qkv), argnums=(0, 1, 2)))(q, k, v)
        for a, b in zip(found, wanted, strict=True):
            assert jnp.isfinite(a).all()
            assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 2e-2 * jnp.linalg.norm(b)
