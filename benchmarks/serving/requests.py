"""Requests of a benchmark: random tokens, as many as ShareGPT's first questions and replies have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode.prompts import BYTES_PER_TOKEN, first_exchanges

LEAST_TOKENS = 4
RANDOM_LENGTHS = (128, 128)
"""Tokens of a prompt and of its answer, without conversations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: a model's name, token ids and the number of tokens that answer it."""

    model: str
    prompt: list[int]
    new_tokens: int

    def table(self) -> dict[str, Any]:
        return asdict(self)


def lengths_of(conversations: Path | None, count: int, *, max_prompt: int, max_new: int) -> list[tuple[int, int]]:
    """(prompt tokens, new tokens) of `count` requests; conversations that are too long or short are left out, and those
    that are left come again if they are too few."""
    if conversations is None:
        return [(min(RANDOM_LENGTHS[0], max_prompt), min(RANDOM_LENGTHS[1], max_new))] * count
    found = []
    for pair in first_exchanges(conversations):
        prompt, reply = (math.ceil(len(text.encode()) / BYTES_PER_TOKEN) for text in pair)
        if LEAST_TOKENS <= prompt <= max_prompt and reply >= LEAST_TOKENS:
            found.append((prompt, min(reply, max_new)))
    if not found:
        raise SystemExit(f"--conversations {conversations}: none has {LEAST_TOKENS} to {max_prompt} tokens")
    order = np.random.default_rng(0).permutation(len(found))
    return [found[order[i % len(found)]] for i in range(count)]


def make_requests(lengths: Sequence[tuple[int, int]], models: Sequence[str], vocab_size: int, seed: int) -> list[Asked]:
    """Requests of these lengths, for the models in turn; no two prompts begin alike, as caches would share them."""
    rng = np.random.default_rng(seed)
    return [
        Asked(model=models[i % len(models)], prompt=rng.integers(3, vocab_size, prompt).tolist(), new_tokens=new)
        for i, (prompt, new) in enumerate(lengths)
    ]
