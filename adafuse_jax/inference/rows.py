"""Rows: prompts and their answers while they are decoded, and which prompts can be."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.adapter_bank import Loaded
from adafuse_jax.inference.logprobs import LogProbs, TokenLogprobs
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.models.hooks import TokenExperts


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A prompt in a slot, and its answer so far.

    `token_ids` leaves out the token that ended the row. `seconds` is the host's time for each token, the first of which
    is the prefill's; `experts` [k], numbers within the row's adapter, are those that read each token after the prompt, with
    `gates` [k]. `logprobs` are of `token_ids`, `prompt_logprobs` of the prompt's tokens, each with as many of the likeliest
    tokens as were wanted (None: none are computed). `cached`: tokens of the prompt that a cache had. Whoever reads the row
    may set `finish_reason`, which ends it. `is_released`: it stands still on the device.
    """

    slot: int
    prompt: Sequence[int]
    budget: int
    sampling: Sampling
    seed: int
    sample: int
    stop_ids: tuple[int, ...]
    reuse_cache: bool
    adapter: Loaded | None = None
    wanted_logprobs: int | None = None
    wanted_prompt_logprobs: int | None = None
    cached: int = 0
    issued: int = 0
    token_ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    gates: list[np.ndarray] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "evicted", "not_finite"] | None = None
    is_released: bool = False
    _clock: float = 0.0

    def begin(self) -> None:
        self._clock = time.perf_counter()

    def take(self, token_id: int, done: bool, experts: TokenExperts | None, logprobs: LogProbs | None) -> None:
        """The next token; `done`: it is one of `stop_ids`. `experts` and `logprobs`: of all slots, on the host."""
        now = time.perf_counter()
        self.seconds.append(now - self._clock)
        self._clock = now
        if experts is not None:
            chosen, gates = (np.asarray(x)[self.slot] for x in experts)
            if self.adapter is not None:
                chosen, gates = self.adapter.numbers_of(chosen), gates[: self.adapter.top_k]
            self.experts.append(chosen)
            self.gates.append(gates)
        if done:
            self.finish_reason = "stop"
        else:
            self.token_ids.append(token_id)
            if logprobs is not None and self.wanted_logprobs is not None:
                self.logprobs.append(TokenLogprobs.of(token_id, logprobs, (self.slot,), self.wanted_logprobs))
            self.finish_reason = "length" if len(self.seconds) == self.budget else None

    def tokens_in_cache(self) -> list[int]:
        """Tokens whose keys and values are in the cache: all but the newest, which the model may not have read yet."""
        return [*self.prompt, *self.token_ids][: len(self.prompt) + len(self.seconds) - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One token of some rows: ids [B], whether each row's was the end of it, and the experts and gates [B, k] that *read*
    the token before (None for the bare backbone, and for tokens that prefill sampled; of a bank the numbers among all
    experts). Only the slots of `rows` mean something."""

    ids: np.ndarray
    done: np.ndarray
    experts: np.ndarray | None
    gates: np.ndarray | None
    rows: Mapping[int, Row]
    """Rows by slot, this token included."""
    seconds: float
    """Host time since the step before this; of the first: since its prefill began."""


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raise `UserError` for a prompt without tokens or with ids that the model has not."""
    if not len(prompt):
        raise UserError("a prompt is empty; give it at least one token")
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise UserError(
            f"the prompt has token {wrong} and the model {vocab_size} tokens: its tokenizer is of another model; "
            "restore the files in --model"
        )


def fitting_tokens(prompt_tokens: int, wanted: int, context: int) -> int:
    """`wanted` new tokens, or as many as a context of so many tokens has left after the prompt. Raises `UserError` if it has
    none."""
    if prompt_tokens >= context:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens and the context holds {context}, the answer included; "
            "shorten the prompt"
        )
    return min(wanted, context - prompt_tokens)
