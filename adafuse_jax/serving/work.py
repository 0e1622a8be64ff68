"""A row that a request asks for, from its place in the queue to its last token, and the events that answer it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.serving.models import ServedModel

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The row's prompt has been read: how many of its tokens came from the cache, and their log-probabilities, if asked."""

    cached: int
    prompt_logprobs: list[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """The next token; `id` None: one that ends the row and is no part of its text.

    `experts` [(expert, gate)] read the token *before* this one; None for the first, and for the bare backbone.
    """

    id: int | None
    finish_reason: FinishReason | None
    logprobs: Any = None
    experts: list[tuple[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The row has ended without an answer."""

    status: int
    message: str


Event = Begun | Token | Failed


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """One row. `events` receives (index, event) in the thread of the event loop; `index` numbers the rows of a request.

    `logprobs`, `prompt_logprobs`: how many of the likeliest tokens come with each token; None: no log-probabilities.
    """

    index: int
    model: ServedModel
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    sample: int
    stop_ids: tuple[int, ...]
    events: asyncio.Queue[tuple[int, Event]]
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    arrived: float = field(default_factory=time.perf_counter)
    slot: int | None = None
    read: int = 0
    """Tokens that have been handed over."""
    last: float = 0.0
    """Host time of the newest token."""
    is_over: bool = False
    """Ended or cancelled: nothing more is handed over. Set in the scheduler's thread."""
