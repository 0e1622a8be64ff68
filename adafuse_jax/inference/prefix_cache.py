"""The tokens whose keys and values are in the cache of each slot, and the longest beginning of a prompt among them.

Keys and values depend on the adapter that read the tokens, so that only prompts with the same adapter, in the same version,
begin alike. A running row is a source as well as a slot that is free. Where RoPE depends on the length of the prompt, so do
keys: prompts longer than the original length share nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from adafuse_jax.inference.adapter_bank import Loaded
from adafuse_jax.inference.prefill import common_length
from adafuse_jax.inference.rows import Row
from adafuse_jax.models.config import ModelConfig

LEAST_MOVED = 128
"""Tokens in a slot that are worth a copy to another one."""


class PrefixCache:
    """Tokens that free slots hold, by slot."""

    def __init__(self, num_slots: int, config: ModelConfig):
        self._max_prompt = min(config.length_limits.values(), default=math.inf)
        self._tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self._adapters: list[Loaded | None] = [None] * num_slots
        self._kept_at, self._clock = [0] * num_slots, 0

    def keep(self, row: Row) -> None:
        """The row leaves its slot, and its tokens stay there."""
        self._clock += 1
        self._kept_at[row.slot], self._adapters[row.slot] = self._clock, row.adapter
        self._tokens[row.slot] = row.tokens_in_cache() if self._is_shared(row) else []

    def forget(self, slot: int) -> None:
        self._tokens[slot] = []

    def free_slot(self, free: Sequence[int], prompt: Sequence[int], adapter: Loaded | None) -> int:
        """The free slot that holds most of the prompt; of several the one that has been free the longest."""
        return max(free, key=lambda slot: (self.common(slot, prompt, adapter), -self._kept_at[slot]))

    def begin(
        self, row: Row, rows: Mapping[int, Row], copy: Callable[[int, int, int], None], *, keeps_more: bool
    ) -> None:
        """A row takes its slot: `cached` becomes the number of tokens of its prompt that are there, from any slot. `copy`
        (source, target, tokens); `rows`: those in slots. `keeps_more`: what the row overwrites is copied to the slot that
        has been free the longest, as the same slots are taken again and again, but for the one that the row begins from."""
        source = row.slot
        if row.reuse_cache and not row.sampling.penalize and row.wanted_prompt_logprobs is None:
            source, row.cached = self.source_of(row, [other for other in rows.values() if other is not row])
        if keeps_more and row.reuse_cache:
            taken = {*rows, source} if row.cached else rows
            self._make_room(row, [slot for slot in range(len(self._tokens)) if slot not in taken], copy)
        if source != row.slot and row.cached:
            copy(source, row.slot, row.cached)
        self.forget(row.slot)

    def _make_room(self, row: Row, free: Sequence[int], copy: Callable[[int, int, int], None]) -> None:
        slot, held = row.slot, self._tokens[row.slot]
        if free and len(held) - self.common(slot, row.prompt, row.adapter) >= LEAST_MOVED:
            target = min(free, key=lambda slot: self._kept_at[slot])
            copy(slot, target, len(held))
            self._tokens[target], self._tokens[slot] = held, []
            self._adapters[target], self._kept_at[target] = self._adapters[slot], self._kept_at[slot]

    def common(self, slot: int, prompt: Sequence[int], adapter: Loaded | None) -> int:
        """Tokens that the prompt and a free slot begin with."""
        if self._adapters[slot] != adapter or len(prompt) > self._max_prompt:
            return 0
        return common_length(prompt, self._tokens[slot])

    def _is_shared(self, row: Row) -> bool:
        """True if other prompts may begin with the row's keys and values."""
        return row.finish_reason != "not_finite" and len(row.prompt) <= self._max_prompt

    def source_of(self, row: Row, running: Iterable[Row]) -> tuple[int, int]:
        """(slot, number of tokens): where most of a row's prompt is; its own slot, if no other has more."""
        found = [
            (self.common(slot, row.prompt, row.adapter), slot == row.slot, slot) for slot in range(len(self._tokens))
        ]
        for other in running if len(row.prompt) <= self._max_prompt else ():
            if other.issued and other.adapter == row.adapter and self._is_shared(other):
                found.append((common_length(row.prompt, other.tokens_in_cache()), False, other.slot))
        length, _, slot = max(found)
        return slot, length
