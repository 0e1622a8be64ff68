"""From logits to the next token, on the device: repetition penalty → temperature → top-k → top-p → draw."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose a token. Only the two flags are static: other values change without recompiling.

    temperature 0 (`greedy`) takes the likeliest token; top_k 0 and top_p 1 leave the distribution whole.
    """

    greedy: bool = field(metadata={"static": True})
    penalize: bool = field(metadata={"static": True})
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    @classmethod
    def of(
        cls, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0
    ) -> Sampling:
        return cls(
            greedy=temperature == 0,
            penalize=repetition_penalty != 1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Divide the positive and multiply the negative logits of tokens seen before (arXiv 1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """−inf for tokens past the top_k likeliest (0: none), then past the likeliest that hold probability top_p."""
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    kth = ordered[:, jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab) - 1]
    ordered = jnp.where(ordered >= kth[:, None], ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.isfinite(ordered) & ((before < top_p) | (top_p >= 1))
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""], seen: Bool[Array, "B V"] | None
) -> Int[Array, " B"]:
    """The next token of every row; `seen` marks the tokens of prompt and output, needed only to penalize them.

    All rows share one noise, so that a row draws what it would draw alone.
    """
    if sampling.penalize:
        assert seen is not None
        logits = penalize(logits, seen, jnp.asarray(sampling.repetition_penalty))
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    logits = keep_likely(logits, jnp.asarray(sampling.top_k), jnp.asarray(sampling.top_p))
    noise = jax.random.gumbel(key, (1, logits.shape[-1]), logits.dtype)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
