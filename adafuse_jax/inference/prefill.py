"""Prefill: prompts in chunks whose lengths come from a few buckets, so that few programs serve all lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax.numpy as jnp
import numpy as np

from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import row_keys

CHUNKS = (16, 64, 128, 256, 384, 512, 768, 1024)
"""Prompt tokens per prefill program; a prompt runs through the largest and then the smallest that holds the rest. Below 64 a
program costs what reading the weights does, whatever it holds; above 256 less than a third is padding."""
MAX_TOKENS = 8192
"""Tokens of all rows per program, which bound the memory of activations and scores; as many fill any GPU."""
LARGEST_BESIDE_ROWS = 256
"""Prompt tokens per program, at most, while other rows wait for it with their next token."""


@dataclass(slots=True, kw_only=True)
class Prefill:
    """Rows whose prompts are prefilled together, in chunks of `sizes`, `done` of which are queued.

    `whole`: they are all slots. `logits` [R, V] and `keys` [R] are those of their first tokens.
    """

    rows: list[Row]
    sizes: list[int]
    whole: bool
    logits: Any
    keys: Any
    done: int = 0

    @classmethod
    def of(cls, rows: list[Row], vocab_size: int, *, whole: bool, beside_rows: bool = False) -> Prefill:
        """The prefill of `rows` before its first chunk. `beside_rows`: others run meanwhile."""
        by_seed = [(seed, list(alike)) for seed, alike in groupby(rows, key=lambda row: row.seed)]
        keys = [row_keys(seed, [r.prompt for r in alike], [r.sample for r in alike]) for seed, alike in by_seed]
        longest = max(len(row.prompt) - row.cached for row in rows)
        most = LARGEST_BESIDE_ROWS if beside_rows else CHUNKS[-1]
        return cls(
            rows=rows,
            sizes=chunk_lengths(longest, min(most, MAX_TOKENS // len(rows))),
            whole=whole,
            logits=jnp.zeros((len(rows), vocab_size), jnp.float32),
            keys=keys[0] if len(keys) == 1 else jnp.concatenate(keys),
        )

    @property
    def slots(self) -> np.ndarray:
        return np.array([row.slot for row in self.rows], np.int32)

    def chunk(self, at: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens [R, size], starts [R], lengths [R]) of the chunk that begins `at` tokens after what the cache has."""
        tokens = np.zeros((len(self.rows), size), np.int32)
        rest = [row.prompt[row.cached + at :][:size] for row in self.rows]
        for line, part in zip(tokens, rest, strict=True):
            line[: len(part)] = part
        starts = np.array([row.cached + at for row in self.rows], np.int32)
        return tokens, starts, np.array([len(part) for part in rest], np.int32)


def chunk_lengths(length: int, most: int | None = None) -> list[int]:
    """Chunks that hold a prompt: the largest, of at most `most` tokens if that is given, as often as it is filled, then the
    smallest for the rest."""
    largest = max((c for c in CHUNKS if most is None or c <= most), default=CHUNKS[0])
    whole, rest = divmod(length, largest)
    return [largest] * whole + [next(c for c in CHUNKS if c >= rest)] * (rest > 0)


def common_length(prompt: Sequence[int], cached: Sequence[int]) -> int:
    """Tokens that both begin with; the prompt's last has to be read in any case."""
    low, high = 0, min(len(prompt) - 1, len(cached))
    while low < high:  # halving compares lists, where a loop over tokens would hold up the steps
        middle = (low + high + 1) // 2
        if prompt[low:middle] == cached[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
