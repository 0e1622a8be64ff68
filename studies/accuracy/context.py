"""Contexts of the one router: functions of the tokens so far that are known before layer 0.

    decayed mean   m_t = λ m_{t−1} + (1 − λ) x_t                       from a text's first token on
    convolution    m_t = Σ_k c_k ∘ x_{t−k},  k = 0 … K − 1             causal, one kernel for each channel
    request        m_t = mean of the bare backbone's last hidden states over the prompt, the same for all tokens of a text

x_t is the normalised first norm of token t's embedding. What a decode step needs of the tokens before is `past`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.replicas import replica_attention


def normalized(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x / rms(x)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def decayed(
    x: Float[Array, "B T D"], positions: Int[Array, "B T"], decay: float, past: Float[Array, "B D"] | None
) -> Float[Array, "B T D"]:
    """The decayed mean, where m = 0 before position 0; `past` is the one before the first token."""
    keep = jnp.where(positions == 0, 0.0, decay)[..., None]  # [B, T, 1]
    new = (1 - decay) * x
    if past is not None:
        new = new.at[:, 0].add(keep[:, 0] * past)

    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(join, (jnp.broadcast_to(keep, new.shape), new), axis=1)[1]


def windows(
    x: Float[Array, "B T D"], positions: Int[Array, "B T"], width: int, past: Float[Array, "B K D"] | None
) -> Float[Array, "B T K D"]:
    """The `width` = K last inputs at every token, the newest first, 0 before a text's first; `past` is the window before the
    first token."""
    length = x.shape[1]
    before = jnp.zeros((x.shape[0], width, x.shape[2]), x.dtype) if past is None else past[:, ::-1]
    joined = jnp.concatenate([before, x], axis=1)
    taps = [
        jnp.where((positions >= k)[..., None], joined[:, width - k : width - k + length], 0.0) for k in range(width)
    ]
    return jnp.stack(taps, axis=2)


def request(
    model: Backbone,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    prompts: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
    """The mean over the prompt of every token's text. No gradient; a pass of the bare backbone, once for a request."""
    out = model.run(tokens, positions=positions, segment_ids=segment_ids, attention=replica_attention)
    hidden = jax.lax.stop_gradient(out.hidden).astype(jnp.float32)
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & prompts[:, None, :]  # [B, T, T]
    weights = same / jnp.maximum(same.sum(-1, keepdims=True), 1)
    return jnp.einsum("bts,bsd->btd", weights, hidden, precision=jax.lax.Precision.HIGHEST)
