"""Sampling of the next token from logits, on the device: penalties → temperature → top-k → top-p → draw."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.inference.config import LEAST_TEMPERATURE

MOST_TEMPERATURE = 1e30
"""Temperatures above count as this one, at which every distribution of float32 logits is uniform."""
PENALTY_BOUNDS = (1e-30, 1e30)
"""Range of the repetition penalty: at the bounds it outweighs every logit, and all logits stay finite."""
MOST_SUBTRACTED = 1e30
"""Size of the presence and frequency penalties, at most."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters: numbers for one row or for all rows, or arrays [B] with a value for each row (by `stack`). Only
    the two flags are static: other values change without recompiling.

    temperature 0, or less than `LEAST_TEMPERATURE`, takes the likeliest token; top_k 0 and top_p 1 leave the distribution
    whole. `greedy`: every row takes the likeliest; `penalize`: some row has a penalty. The repetition penalty is of tokens
    in prompt and output, `presence_penalty` and `frequency_penalty` of those in the output: the one is subtracted from
    their logits once, the other as often as they come.
    """

    greedy: bool = field(metadata={"static": True})
    penalize: bool = field(metadata={"static": True})
    temperature: float | Float[Array, " B"]
    top_k: int | Int[Array, " B"]
    top_p: float | Float[Array, " B"]
    repetition_penalty: float | Float[Array, " B"]
    presence_penalty: float | Float[Array, " B"]
    frequency_penalty: float | Float[Array, " B"]

    @classmethod
    def of(
        cls, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
    ) -> Sampling:  # fmt: skip
        low, high = PENALTY_BOUNDS
        subtracted = (min(max(p, -MOST_SUBTRACTED), MOST_SUBTRACTED) for p in (presence_penalty, frequency_penalty))
        presence, frequency = subtracted
        return cls(
            greedy=temperature < LEAST_TEMPERATURE,
            penalize=repetition_penalty != 1 or presence_penalty != 0 or frequency_penalty != 0,
            temperature=0.0 if temperature < LEAST_TEMPERATURE else min(temperature, MOST_TEMPERATURE),
            top_k=min(top_k, 2**31 - 1),
            top_p=top_p,
            repetition_penalty=min(max(repetition_penalty, low), high),
            presence_penalty=presence,
            frequency_penalty=frequency,
        )

    @classmethod
    def stack(cls, rows: Sequence[Sampling]) -> Sampling:
        """The settings of every row, on the host."""

        def column(name: str, dtype: Any) -> Any:
            return np.array([getattr(row, name) for row in rows], dtype)

        return cls(
            greedy=all(row.greedy for row in rows),
            penalize=any(row.penalize for row in rows),
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            presence_penalty=column("presence_penalty", np.float32),
            frequency_penalty=column("frequency_penalty", np.float32),
        )


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "#B 1"]
) -> Float[Array, "B V"]:
    """Divide the positive and multiply the negative logits of tokens seen before (arXiv 1909.05858); all stay finite."""
    penalized = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    largest = jnp.finfo(logits.dtype).max
    return jnp.clip(penalized, -largest, largest)


def subtract_penalties(
    logits: Float[Array, "B V"],
    counts: Int[Array, "B V"],
    presence: Float[Array, "#B 1"],
    frequency: Float[Array, "#B 1"],
) -> Float[Array, "B V"]:
    """Subtract `presence` from the logits of tokens in the output, and `frequency` times their counts; all stay finite."""
    largest = jnp.finfo(logits.dtype).max
    return jnp.clip(logits - jnp.where(counts > 0, presence + frequency * counts, 0), -largest, largest)


def keep_likely(
    logits: Float[Array, "B V"], top_k: Int[Array, "#B 1"], top_p: Float[Array, "#B 1"]
) -> Float[Array, "B V"]:
    """−inf for tokens past the top_k likeliest (0: none), then past the likeliest that hold probability top_p; the
    likeliest stays in any case."""
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab) - 1
    kth = jnp.take_along_axis(ordered, jnp.broadcast_to(last, (len(logits), 1)), axis=-1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    first = jnp.arange(vocab) == 0  # a denormal top_p is 0 on a device
    is_likely = jnp.isfinite(ordered) & (first | (before < top_p) | (top_p >= 1))
    threshold = jnp.min(jnp.where(is_likely, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def row_keys(seed: int, prompts: Sequence[Sequence[int]], samples: Sequence[int]) -> Key[Array, " B"]:
    """A row's own source of noise: of the seed, its prompt and which sample of that prompt it is, not of its neighbours."""
    digests = [zlib.crc32(np.asarray(prompt, np.int64).tobytes()) for prompt in prompts]
    return _folded(np.uint32(seed), np.array(digests, np.uint32), np.array(samples, np.uint32))


@jax.jit
def _folded(seed: Int[Array, ""], digests: Int[Array, " B"], samples: Int[Array, " B"]) -> Key[Array, " B"]:
    key = jax.random.key(seed)
    fold = jax.vmap(lambda digest, sample: jax.random.fold_in(jax.random.fold_in(key, digest), sample))
    return fold(digests, samples)


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"], seen: Int[Array, "B V"] | None
) -> Int[Array, " B"]:
    """The next token of every row, each with the noise of its key, so that a row draws what it would draw alone; `seen`: see
    `DecodeState`, needed only to penalize."""
    columns = "temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
    temperature, top_k, top_p, penalty, presence, frequency = (
        jnp.atleast_1d(jnp.asarray(getattr(sampling, name)))[:, None]  # [B, 1], or [1, 1]
        for name in columns
    )
    if sampling.penalize:
        assert seen is not None
        logits = penalize(logits, seen > 0, penalty)
        logits = subtract_penalties(logits, jnp.maximum(seen - 1, 0), presence, frequency)
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The likeliest at 0, so that a low temperature sends the others to -inf and never two to +inf.
    drawn = temperature > 0  # a greedy row beside others: its own largest logit, without noise
    logits = (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(drawn, temperature, 1)
    logits = keep_likely(logits, top_k, top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
    return jnp.argmax(logits + jnp.where(drawn, noise, 0), axis=-1).astype(jnp.int32)
