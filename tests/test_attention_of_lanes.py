"""Attention under vmap against the same attention lane by lane: values and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafuse_jax.models.attention import attention, attention_of_lanes

LANES, ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 3, 2, 8, 6, 2, 4


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("own_masks", [False, True], ids=["one mask", "a mask a lane"])
def test_lanes_equal_single_calls(own_masks: bool, remat: bool):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (LANES, ROWS, LENGTH, HEADS, HEAD_DIM))
    k, v = (jax.random.normal(key, (LANES, ROWS, LENGTH, KV_HEADS, HEAD_DIM)) for key in keys[1:3])
    seen = jax.random.bernoulli(keys[3], 0.7, (LANES, ROWS, LENGTH, LENGTH))
    mask = seen & jnp.tril(jnp.ones((LENGTH, LENGTH), bool)) | jnp.eye(LENGTH, dtype=bool)
    mask = mask if own_masks else mask[0]

    def gradients(attend: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, mask: Any) -> Any:
            def layer(x: Any, _: None) -> tuple[Any, None]:
                return x + attend(x, k, v, mask), None

            body = jax.checkpoint(layer) if remat else layer
            return jnp.sum(jnp.sin(jax.lax.scan(body, q, None, length=2)[0]))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))

    together = jax.jit(jax.vmap(gradients(attention_of_lanes), (0, 0, 0, 0 if own_masks else None)))(q, k, v, mask)
    for lane in range(LANES):
        alone = gradients(attention)(q[lane], k[lane], v[lane], mask[lane] if own_masks else mask)
        for here, there in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(here[lane], there, rtol=1e-5, atol=1e-5)
