"""The decoding state of a set of slots: a pytree that every program is donated and replaces. A slot is one row, [B].

A row's pending token was sampled but not read; the next step reads it and writes its keys and values at `position`. A row
that has ended, and an empty slot, has `done`: its position stands still, so that what it writes lies behind its own tokens,
where nothing reads. While its prompt is prefilled a row stands behind the cache's end, where writes are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from adafuse_jax.adapters.stacked import NO_ADAPTER
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.kv_cache import KVCache

MIN_CACHE_LENGTH = 128


def cache_length(tokens: int, fixed: int | None = None) -> int:
    """Positions of the cache that holds `tokens`: the next power of two; or those of a context of a `fixed` length, the next
    multiple of `MIN_CACHE_LENGTH`."""
    if fixed is not None:
        return -(-fixed // MIN_CACHE_LENGTH) * MIN_CACHE_LENGTH
    return max(MIN_CACHE_LENGTH, 1 << (tokens - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """`token`: pending; `position`: where it goes; `seen`: if a penalty needs it, 0 for tokens that are neither in prompt
    nor output, for the others 1 and how often they are in the output; `key`: each row's own source of noise; `adapter`: each
    row's id in a bank, None without one."""

    cache: KVCache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Int[Array, "B V"] | None
    key: Key[Array, " B"]
    adapter: Int[Array, " B"] | None = None

    @classmethod
    def empty(
        cls, config: ModelConfig, num_slots: int, length: int, dtype: jnp.dtype, *, with_bank: bool = False
    ) -> DecodeState:
        """State without rows, with a cache of `length` positions."""
        return cls(
            cache=KVCache.empty(config, num_slots, length, dtype),
            token=jnp.zeros(num_slots, jnp.int32),
            position=jnp.zeros(num_slots, jnp.int32),
            done=jnp.ones(num_slots, bool),
            seen=None,
            key=jax.random.split(jax.random.key(0), num_slots),
            adapter=jnp.full(num_slots, NO_ADAPTER, jnp.int32) if with_bank else None,
        )

    def grown(self, length: int) -> DecodeState:
        """The same rows, with at least `length` positions in the cache."""
        return replace(self, cache=self.cache.grown(length))

    def with_seen(self, vocab_size: int | None) -> DecodeState:
        """The state with `seen`, all 0 unless it had one; for a `vocab_size` of None the state without `seen`."""
        if vocab_size is None or self.seen is not None:
            return self if vocab_size else replace(self, seen=None)
        return replace(self, seen=jnp.zeros((len(self.token), vocab_size), jnp.int32))
