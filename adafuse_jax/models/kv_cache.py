"""The KV cache: keys and values of every layer at their absolute positions.

A row's token at position p lives in slot p, so padding never enters the cache and a query at position p sees slots ≤ p.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adafuse_jax.models.config import ModelConfig

COPIED_POSITIONS = 128
"""Positions that are copied together from one row to another."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KVCache:
    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    def grown(self, slots: int) -> KVCache:
        """The same cache with room for at least `slots` positions."""
        more = max(0, slots - self.slots)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))) if more else x, self)

    def rows(self, rows: Int[Array, " R"]) -> KVCache:
        """A copy of some rows, [L, R, S, K, H]."""
        return jax.tree.map(lambda x: x[:, rows], self)

    def with_rows(self, rows: Int[Array, " R"], new: KVCache) -> KVCache:
        """Some rows replaced."""
        return jax.tree.map(lambda x, y: x.at[:, rows].set(y), self, new)

    def with_prefix(self, source: Int[Array, ""], target: Int[Array, ""], length: Int[Array, ""]) -> KVCache:
        """The first `length` positions of one row copied to another, in blocks: what lies behind them there is replaced
        up to the end of a block."""
        block = min(COPIED_POSITIONS, self.slots)

        def copy_block(i: Int[Array, ""], cache: KVCache) -> KVCache:
            def copy(x: Array) -> Array:
                part = jax.lax.dynamic_slice(x, (0, source, i * block, 0, 0), (x.shape[0], 1, block, *x.shape[3:]))
                return jax.lax.dynamic_update_slice(x, part, (0, target, i * block, 0, 0))

            return jax.tree.map(copy, cache)

        return jax.lax.fori_loop(0, (length + block - 1) // block, copy_block, self)

    def write(
        self,
        layer: Int[Array, ""],
        positions: Int[Array, "B T"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> KVCache:
        """Store one layer's keys and values; a position ≥ S (padding) is dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        at = (layer, rows, positions)
        return KVCache(
            self.k.at[at].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[at].set(v.astype(self.v.dtype), mode="drop"),
        )
