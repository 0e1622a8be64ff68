"""One token's attention to its cache in plain XLA: the definition that the kernel is tested against.

q, k ← rope(norm(q)), rope(norm(k));   cache[position] ← k, v;   out = Σ_s softmax_s(cap(m q · k_s)) v_s
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def decode_attention_xla(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cache_k: Float[Array, "L B S K H"],
    cache_v: Float[Array, "L B S K H"],
    layer: Int[Array, 1],
    position: Int[Array, " B"],
    cos: Float[Array, "B H/2"],
    sin: Float[Array, "B H/2"],
    windows: Int[Array, " L"],
    *,
    q_norm: Float[Array, "L H"] | None = None,
    k_norm: Float[Array, "L H"] | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B N H"], Array, Array]:
    """(out, cache_k, cache_v); see `kernel_triton.decode_attention`."""
    batch, num_kv_heads, head_dim = k.shape
    at_layer, slots, dtype = layer[0], cache_k.shape[2], q.dtype

    def rotated(x: Array, norm: Array | None) -> Array:
        x32 = x.astype(jnp.float32)
        if norm is not None:
            x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
            x32 = (x32.astype(dtype) * norm[at_layer]).astype(jnp.float32)
        first, second = jnp.split(x32, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(dtype)

    at = at_layer, jnp.arange(batch), position
    cache_k = cache_k.at[at].set(rotated(k, k_norm), mode="drop")
    cache_v = cache_v.at[at].set(v, mode="drop")
    grouped = rotated(q, q_norm).reshape(batch, num_kv_heads, -1, head_dim)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum(
        "bkgh,bskh->bkgs", grouped, cache_k[at_layer], preferred_element_type=jnp.float32, precision=exact
    ) * (head_dim**-0.5 if scale is None else scale)  # fmt: skip
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    distance = position[:, None] - jnp.arange(slots)  # [B, S]
    seen = (distance >= 0) & (distance < windows[at_layer])
    p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum(
        "bkgs,bskh->bkgh", p.astype(dtype), cache_v[at_layer], preferred_element_type=jnp.float32, precision=exact
    )
    return out.reshape(q.shape).astype(dtype), cache_k, cache_v
