"""Losses of packed questions → the measures of a set, its score, and the mixture's mean (see `tasks`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.models.attention import attention_of_lanes
from adafuse_jax.models.decoder import Backbone
from benchmarks.accuracy_data import Packed
from studies.accuracy.tasks import MEASURES, SETS
from studies.accuracy.training import seen


@jax.jit
def target_losses(
    model: Backbone,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    place: Int[Array, "B K"],
    wanted: Int[Array, "B K"],
    task: Int[Array, ""],
) -> tuple[Float[Array, "S B K"], Bool[Array, "S B K"]]:
    """(−log p of every target in nats, whether it is the likeliest token) under every replica."""

    def one(params: Any) -> tuple[Array, Array]:
        adapter, _ = seen(params, model, tokens, positions, jnp.full_like(tokens, task))
        out = model.run(
            tokens, adapter=adapter, positions=positions, segment_ids=segment_ids, attention=attention_of_lanes
        )
        hidden = jnp.take_along_axis(out.hidden, place[..., None], axis=1)  # [B, K, D]
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == wanted

    return jax.vmap(one)(params)


def measures(
    model: Backbone,
    params: Any,
    scored: Mapping[str, Packed],
    *,
    batch_size: int,
    losses_of: Callable[..., tuple[Array, Array]] = target_losses,
) -> list[dict[str, dict[str, float]]]:
    """Of every replica: set → measures of its questions, but for what must be decoded."""
    pending = {
        name: _losses(model, params, packed, SETS.index(name), batch_size, losses_of) for name, packed in scored.items()
    }
    found = {name: jax.device_get(parts) for name, parts in pending.items()}
    replicas = len(next(iter(found.values()))[0][0])
    result: list[dict[str, dict[str, float]]] = [{} for _ in range(replicas)]
    for name, parts in found.items():
        rows = len(scored[name].tokens)
        losses, hits = (np.concatenate([part[i] for part in parts], axis=1)[:, :rows] for i in (0, 1))
        for replica in range(replicas):
            result[replica][name] = measured(scored[name], losses[replica], hits[replica])
    return result


def _losses(
    model: Backbone, params: Any, packed: Packed, task: int, batch_size: int, losses_of: Callable[..., Any]
) -> list[tuple[Array, Array]]:
    parts = []
    for at in range(0, len(packed.tokens), batch_size):
        arrays = [
            np.pad(array[at : at + batch_size], ((0, max(0, at + batch_size - len(array))), (0, 0)))
            for array in (packed.tokens, packed.positions, packed.segment_ids, packed.place, packed.wanted)
        ]
        parts.append(losses_of(model, params, *arrays, np.int32(task)))
    return parts


def measured(packed: Packed, losses: Float[np.ndarray, "N K"], hits: Bool[np.ndarray, "N K"]) -> dict[str, float]:
    """Choices: accuracy, and the mean −log of the right choice's share of the probability. Texts: mean loss of a token,
    its `likelihood`, and the share that is right in all tokens. In points, losses in nats."""
    there = packed.owner >= 0
    sums, wrong = np.zeros(sum(packed.choices)), np.zeros(sum(packed.choices))
    np.add.at(sums, packed.owner[there], losses[there])
    np.add.at(wrong, packed.owner[there], ~hits[there])
    if max(packed.choices) == 1:
        loss = float(losses[there].mean())
        return {"loss": loss, "likelihood": 100 * float(np.exp(-loss)), "exact": 100 * float(np.mean(wrong == 0))}
    of_right = [
        sums[first + answer] + _log_sum_exp(-sums[first:last])
        for (first, last), answer in zip(pairwise(np.cumsum([0, *packed.choices])), packed.answers, strict=True)
    ]
    return {"choice_loss": float(np.mean(of_right)), "accuracy": 100 * packed.accuracy(sums)}


def _log_sum_exp(x: np.ndarray) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def score(name: str, found: Mapping[str, float]) -> float:
    """Of a set, from its measures."""
    return float(np.mean([found[measure] for measure in MEASURES[name]]))


def mixture_mean(found: Mapping[str, Mapping[str, float]]) -> float:
    """Of one replica's measures of all sets."""
    return float(np.mean([score(name, found[name]) for name in SETS]))


def probability_mean(found: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over the sets of 100 · exp(−loss of a token, or of a question's choice), which varies less from seed to seed
    than what is right or wrong. It came after the first screening, stands beside the mixture's mean, and chooses nothing."""
    losses = [found[name].get("loss", found[name].get("choice_loss", math.nan)) for name in SETS]
    return float(np.mean(100 * np.exp(-np.array(losses))))
