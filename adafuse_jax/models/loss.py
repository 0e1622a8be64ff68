"""Cross-entropy of the next token, −log p(x_t | x_<t), without the logits of a whole sequence at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.layout import ONE_DEVICE, Layout

LOSS_CHUNK = 256
"""Positions whose logits exist at the same time; the whole [B, T, V] never does."""


def token_losses(
    model: Backbone,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"],
    layout: Layout = ONE_DEVICE,
) -> Float[Array, " B"]:
    """Σ_t −log p(x_t | x_<t) over the targets of every row, in nats, or its sum weighted by a mask of floats; the logits are
    computed LOSS_CHUNK positions at a time.

    Position t − 1 predicts token t, so the first token of a row is never a target.
    """
    batch, length = tokens.shape
    pad = -(length - 1) % LOSS_CHUNK
    chunks = (length - 1 + pad) // LOSS_CHUNK

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, chunks, -1, *x.shape[2:]).swapaxes(0, 1)  # [chunks, B, T/chunks, …]

    head = layout.head(model.head, is_tied=model.lm_head is None)

    @jax.checkpoint
    def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, mask = chunk
        losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden, head), targets)
        return total + jnp.sum(losses * mask, axis=-1), None

    inputs = chunked(hidden[:, :-1]), chunked(tokens[:, 1:]), chunked(loss_mask[:, 1:])
    return jax.lax.scan(add_chunk, jnp.zeros(batch), inputs)[0]
