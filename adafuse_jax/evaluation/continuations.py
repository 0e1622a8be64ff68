"""Log-likelihood of continuations, and whether greedy decoding would generate them.

log p(c | q) = Σ_t log p(c_t | q, c_<t);   greedy  <=>  c_t = argmax_v p(v | q, c_<t) for every t
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.loss import LOSS_CHUNK

LENGTH_BUCKET = 64


@jax.jit
def row_scores(
    model: Backbone, adapter: Any, tokens: Int[Array, "B T"], targets: Bool[Array, "B T"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """(Σ_t log p of the targets, whether all of them are the likeliest tokens) of every row; position t − 1 predicts token
    t, the first token of a row is never a target. Logits exist for LOSS_CHUNK positions at a time."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    hidden = model.run(tokens, adapter=adapter, segment_ids=real.astype(jnp.int32)).hidden
    total, greedy = jnp.zeros(tokens.shape[0]), jnp.ones(tokens.shape[0], bool)
    for start in range(0, tokens.shape[1] - 1, LOSS_CHUNK):
        at = slice(start, min(start + LOSS_CHUNK, tokens.shape[1] - 1))
        asked, wanted = targets[:, 1:][:, at], tokens[:, 1:][:, at]  # [B, chunk]
        logits = model.logits(hidden[:, at])  # [B, chunk, V]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
        total += jnp.sum(log_probs * asked, axis=-1)
        greedy &= jnp.all((jnp.argmax(logits, axis=-1) == wanted) | ~asked, axis=-1)
    return total, greedy


def score_continuations(
    model: Backbone,
    adapter: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batch_size: int,
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, greedy) of each (context, continuation), given as token ids.

    A pair too long is truncated from the left until its last token is predicted from `max_length` tokens. Raises ValueError
    for an empty context or continuation, and for a continuation that is itself longer than `max_length`.
    """
    for context, continuation in pairs:
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(f"{len(context)=} and {len(continuation)=} must be positive, the latter ≤ {max_length=}")
    rows = [[*context, *continuation][-(max_length + 1) :] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    result = [(0.0, False)] * len(rows)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        width = -(-len(rows[members[-1]]) // LENGTH_BUCKET) * LENGTH_BUCKET
        tokens, targets = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
        lengths = np.zeros(batch_size, np.int32)
        for slot, i in enumerate(members):
            n = lengths[slot] = len(rows[i])
            tokens[slot, :n] = rows[i]
            targets[slot, n - len(pairs[i][1]) : n] = True
        total, greedy = jax.device_get(row_scores(model, adapter, tokens, targets, lengths))
        for slot, i in enumerate(members):
            result[i] = float(total[slot]), bool(greedy[slot])
    return result
