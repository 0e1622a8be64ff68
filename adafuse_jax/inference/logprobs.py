"""Log-probabilities of tokens: those of the model's own logits, before penalties, temperature, top-k and top-p; fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.decoder import Backbone

MAX_TOP_LOGPROBS = 20
"""Likeliest tokens whose log-probabilities are computed; a row takes as many of them as it wants."""
POSITIONS_AT_ONCE = 64
"""Positions of a prompt whose logits are in memory together."""


class LogProbs(NamedTuple):
    """Log-probability of the token at each of some positions, and the likeliest tokens with theirs."""

    chosen: Float[Array, "*positions"]
    tokens: Int[Array, "*positions N"]
    top: Float[Array, "*positions N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """One token's log-probability, and the likeliest (token, log-probability) in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, token: int, logprobs: LogProbs, at: tuple[int, ...], count: int) -> TokenLogprobs:
        """From arrays on the host, `at` one of the positions, with the `count` likeliest."""
        tokens, top = logprobs.tokens[at][:count].tolist(), logprobs.top[at][:count].tolist()
        return cls(token=token, logprob=float(logprobs.chosen[at]), top=tuple(zip(tokens, top, strict=True)))


def check_numbers(*numbers: int | None) -> None:
    """Raise `UserError` for numbers of likeliest tokens that are not computed."""
    for number in numbers:
        if number is not None and not 0 <= number <= MAX_TOP_LOGPROBS:
            raise UserError(f"{number} log-probabilities are wanted of each token; give 0 to {MAX_TOP_LOGPROBS}")


def log_probabilities(logits: Float[Array, "*positions V"], tokens: Int[Array, "*positions"]) -> LogProbs:
    """log softmax(logits) at `tokens` and at the likeliest."""
    values = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    top, likeliest = jax.lax.top_k(values, min(MAX_TOP_LOGPROBS, logits.shape[-1]))
    return LogProbs(jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0], likeliest, top)


def of_prompt(model: Backbone, hidden: Float[Array, "R T D"], following: Int[Array, "R T"]) -> LogProbs:
    """Log-probabilities of the token that follows each position, a few positions at a time."""

    def of_position(inputs: tuple[Array, Array]) -> LogProbs:
        return log_probabilities(model.logits(inputs[0]), inputs[1])

    by_position = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (hidden, following))
    found = jax.lax.map(of_position, by_position, batch_size=POSITIONS_AT_ONCE)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def following_tokens(prompts: Sequence[Sequence[int]], starts: np.ndarray, size: int) -> Int[np.ndarray, "R T"]:
    """The token after each position of a chunk that begins at starts[r]; 0 after the prompt's end."""
    found = np.zeros((len(prompts), size), np.int32)
    for line, prompt, start in zip(found, prompts, starts, strict=True):
        part = prompt[start + 1 : start + 1 + size]
        line[: len(part)] = part
    return found


def prompt_logprobs(
    prompt: Sequence[int], count: int, row: int, chunks: Sequence[tuple[int, LogProbs]]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of every token of a prompt, None of the first. `chunks`: (first position, log-probabilities on the
    host), in which the prompt has the number `row`."""
    found: list[TokenLogprobs | None] = [None]
    for start, logprobs in chunks:
        for at in range(min(logprobs.chosen.shape[1], len(prompt) - 1 - start)):
            found.append(TokenLogprobs.of(prompt[start + at + 1], logprobs, (row, at), count))
    return found
