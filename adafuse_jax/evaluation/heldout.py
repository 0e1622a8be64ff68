"""Held-out loss of any data, and accuracy of multiple choice by log-likelihood.

answer = argmax_c Σ_t log p(c_t | question, c_<t)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.data.chat import Encoded
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter
from adafuse_jax.models.layout import ONE_DEVICE, Layout
from adafuse_jax.models.loss import token_losses

LENGTH_BUCKET = 64


@partial(jax.jit, static_argnames="layout")
def row_losses(
    model: Backbone,
    adapter: Adapter | None,
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    lengths: Int[Array, " B"],
    layout: Layout = ONE_DEVICE,
) -> Float[Array, " B"]:
    """−log-likelihood of the targets of every row, in nats."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    out = model.run(tokens, adapter=adapter, segment_ids=real.astype(jnp.int32), max_segments=1, layout=layout)
    return layout.whole(token_losses(model, out.hidden, tokens, loss_mask, layout))


def score(
    model: Backbone,
    adapter: Adapter | None,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    layout: Layout = ONE_DEVICE,
) -> Float[np.ndarray, " rows"]:
    """−log-likelihood of each row's targets, in nats. Rows of like length run together, padded to a multiple of 64.
    Over a mesh its rows divide `batch_size`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    losses = np.zeros(len(rows))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = -(-len(rows[chosen[-1]].tokens) // LENGTH_BUCKET) * LENGTH_BUCKET
        tokens, mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
        lengths = np.zeros(batch_size, np.int32)
        for slot, i in enumerate(chosen):
            n = lengths[slot] = len(rows[i].tokens)
            tokens[slot, :n], mask[slot, :n] = rows[i].tokens, rows[i].loss_mask
        mine = layout.rows(batch_size)
        placed = layout.batch([x[mine.start : mine.stop] for x in (tokens, mask, lengths)], batch_size)
        losses[chosen] = np.asarray(row_losses(model, adapter, *placed, layout=layout))[: len(chosen)]
    return losses


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Tokenised held-out data: `rows` for the loss, and for multiple choice the candidates of every question."""

    rows: list[Encoded]
    choices: list[list[Encoded]]
    answers: list[int]

    def evaluate(
        self, model: Backbone, adapter: Adapter | None, *, batch_size: int, layout: Layout = ONE_DEVICE
    ) -> dict[str, float]:
        """`eval_loss` in nats per target, and `accuracy` in [0, 1] if there are multiple-choice questions."""
        result = {}
        if self.rows:
            losses = score(model, adapter, self.rows, batch_size=batch_size, layout=layout)
            result["eval_loss"] = float(losses.sum() / sum(int(row.loss_mask[1:].sum()) for row in self.rows))
        if self.choices:
            flat = [row for candidates in self.choices for row in candidates]
            scores = iter(score(model, adapter, flat, batch_size=batch_size, layout=layout))
            best = [int(np.argmin([next(scores) for _ in candidates])) for candidates in self.choices]
            result["accuracy"] = float(np.mean(np.array(best) == self.answers))
        return result
