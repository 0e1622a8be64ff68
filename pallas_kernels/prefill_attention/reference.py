"""Attention of a chunk of a prompt to the cache in plain XLA: the definition that the kernel is tested against.

out_t = Σ_s softmax_s(cap(scale q_t · k_s)) v_s        over the positions s of the row that query t sees
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def prefill_attention_xla(
    q: Float[Array, "R T N H"],
    cache_k: Float[Array, "L B S K H"],
    cache_v: Float[Array, "L B S K H"],
    layer: Int[Array, 1],
    rows: Int[Array, " R"],
    starts: Int[Array, " R"],
    lengths: Int[Array, " R"],
    windows: Int[Array, " L"] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "R T N H"]:
    """See `kernel_triton.prefill_attention`. Queries behind a row's length get 0."""
    keys, values = cache_k[layer[0], rows], cache_v[layer[0], rows]  # [R, S, K, H]
    grouped = q.reshape(*q.shape[:2], keys.shape[2], -1, q.shape[3])  # [R, T, K, N/K, H]
    offset = jnp.arange(q.shape[1])
    distance = (starts[:, None] + offset)[:, :, None] - jnp.arange(keys.shape[1])  # [R, T, S]
    seen = distance >= 0
    if windows is not None:
        seen &= distance < windows[layer[0]]
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("rtkgh,rskh->rkgts", grouped, keys, preferred_element_type=jnp.float32, precision=exact)
    scores *= q.shape[3] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).astype(q.dtype)
    out = jnp.einsum("rkgts,rskh->rtkgh", p, values, preferred_element_type=jnp.float32, precision=exact)
    inside = (offset < lengths[:, None])[:, :, None, None]
    return jnp.where(inside, out.reshape(q.shape), 0).astype(q.dtype)
