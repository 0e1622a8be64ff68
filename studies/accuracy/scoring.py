"""Losses of packed questions → the measures of a set, its score, and the mixture's mean (see `tasks`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from adafuse_jax.models.decoder import Backbone
from studies.accuracy.tasks import MEASURES, PASSED, SETS
from studies.questions import Packed
from studies.scoring import score as score_rows


def measures(
    model: Backbone, trained: Any, scored: Mapping[str, Packed], *, batch_size: int, losses_of: Callable[..., Any]
) -> list[dict[str, dict[str, float]]]:
    """Measures of every replica: set → measures of its questions, without those that need decoding."""
    found = {
        name: score_rows(model, trained, packed, batch_size=batch_size, task=SETS.index(name), losses_of=losses_of)
        for name, packed in scored.items()
    }
    replicas = len(next(iter(found.values()))[0])
    return [
        {name: measured(scored[name], losses[replica], hits[replica]) for name, (losses, hits) in found.items()}
        for replica in range(replicas)
    ]


def measured(packed: Packed, losses: Float[np.ndarray, "N K"], hits: Bool[np.ndarray, "N K"]) -> dict[str, float]:
    """Choices: accuracy, and the mean −log of the right choice's share of the probability. Texts: mean loss of a token,
    its `likelihood`, and the share that is right in all tokens. In points, losses in nats."""
    sums, wrong = packed.sums(losses), packed.sums(~hits)
    if max(packed.choices) == 1:
        loss = float(losses[packed.owner >= 0].mean())
        return {"loss": loss, "likelihood": 100 * float(np.exp(-loss)), "exact": 100 * float(np.mean(wrong == 0))}
    of_right = [
        sums[first + answer] + _log_sum_exp(-sums[first:last])
        for (first, last), answer in zip(pairwise(np.cumsum([0, *packed.choices])), packed.answers, strict=True)
    ]
    return {"choice_loss": float(np.mean(of_right)), "accuracy": 100 * packed.accuracy(sums)}


def _log_sum_exp(x: np.ndarray) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def score(name: str, found: Mapping[str, float]) -> float:
    """Score of a set: the mean of its measures in MEASURES; PASSED may be missing."""
    return float(np.mean([found[measure] for measure in MEASURES[name] if measure != PASSED or measure in found]))


def mixture_mean(found: Mapping[str, Mapping[str, float]]) -> float:
    """Mean score over all sets, from one replica's measures."""
    return float(np.mean([score(name, found[name]) for name in SETS]))


def probability_mean(found: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over the sets of 100 · exp(−loss of a token, or of a question's choice), which varies less from seed to seed
    than what is right or wrong. It came after the first screening, stands beside the mixture's mean, and chooses nothing."""
    losses = [found[name].get("loss", found[name].get("choice_loss", math.nan)) for name in SETS]
    return float(np.mean(100 * np.exp(-np.array(losses))))
