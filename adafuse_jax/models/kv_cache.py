"""The KV cache: keys and values of every layer at their absolute positions.

A row's token at position p lives in slot p, so padding never enters the cache and a query at position p sees slots ≤ p.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adafuse_jax.models.config import ModelConfig
from pallas_kernels.prefill_attention import prefill_attention

COPIED_POSITIONS = (256, 1024, 4096, 16384)
"""Positions that are copied from one row to another: the fewest of these that hold a prompt, each a program."""


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

    def of_rows(self, rows: Int[Array, " R"]) -> KVCache:
        """A copy of some rows, [L, R, S, K, H]."""
        return jax.tree.map(lambda x: x[:, rows], self)

    def with_rows(self, rows: Int[Array, " R"], new: KVCache) -> KVCache:
        """Some rows replaced."""
        return jax.tree.map(lambda x, y: x.at[:, rows].set(y), self, new)

    def with_prefix(
        self, source: Int[Array, ""], target: Int[Array, ""], length: Int[Array, ""], *, copied: int
    ) -> KVCache:
        """The first `length` positions of one row, at most `copied`, copied to another. What lies behind them there becomes
        0 up to `copied`: what the source has there may not be finite, and is multiplied by 0.

        Layer by layer, so that the copy needs little memory. No number of steps depends on `length`: a GPU would ask the
        host whether to go on, which then waits for all that is queued before."""
        is_copied = (jnp.arange(copied) < length)[:, None, None]

        def copy_layer(layer: Int[Array, ""], cache: KVCache) -> KVCache:
            def copy(x: Array) -> Array:
                part = jax.lax.dynamic_slice(x, (layer, source, 0, 0, 0), (1, 1, copied, *x.shape[3:]))
                return jax.lax.dynamic_update_slice(x, jnp.where(is_copied, part, 0), (layer, target, 0, 0, 0))

            return jax.tree.map(copy, cache)

        return jax.lax.fori_loop(0, len(self.k), copy_layer, self)

    def copied_positions(self) -> list[int]:
        """Numbers of positions for which `with_prefix` is compiled, smallest first."""
        return [size for size in COPIED_POSITIONS if size < self.slots] + [self.slots]

    def write(
        self,
        layer: Int[Array, ""],
        positions: Int[Array, "R T"],
        k: Float[Array, "R T K H"],
        v: Float[Array, "R T K H"],
    ) -> Self:
        """Store one layer's keys and values; a position ≥ S (padding) is dropped. No two tokens of a row have the same
        position below S."""
        padding = self.slots + jnp.arange(positions.shape[1])
        rows = self._token_rows(positions.shape[0])[:, None]
        at = (layer, rows, jnp.where(positions < self.slots, positions, padding))

        def written(cached: Array, new: Array) -> Array:  # in any order, else a GPU stores each number atomically
            return cached.at[at].set(new.astype(cached.dtype), mode="drop", unique_indices=True)

        return replace(self, k=written(self.k, k), v=written(self.v, v))

    def _token_rows(self, count: int) -> Int[Array, " R"]:
        """Slot of every row of tokens."""
        return jnp.arange(count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCache(KVCache):
    """A cache that the next tokens of some prompts enter: lengths[r] of them, from position starts[r] of slot rows[r] on.

    In a forward pass attention is then the kernel's, which reads what a token sees and nothing else of the cache.
    `windows`: positions that a token of each layer sees; None is all. `scale`, `softcap`: of the scores, see the kernel.
    """

    rows: Int[Array, " R"]
    starts: Int[Array, " R"]
    lengths: Int[Array, " R"]
    windows: Int[Array, " L"] | None
    scale: float | None = field(metadata={"static": True})
    softcap: float | None = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        cache: KVCache,
        config: ModelConfig,
        *,
        rows: Int[Array, " R"],
        starts: Int[Array, " R"],
        lengths: Int[Array, " R"],
    ) -> PromptCache:
        windows = [min(window or cache.slots, cache.slots) for window in config.sliding_windows]
        of_layers = jnp.array(windows, jnp.int32) if any(window < cache.slots for window in windows) else None
        return cls(
            k=cache.k, v=cache.v, rows=rows, starts=starts, lengths=lengths, windows=of_layers,
            scale=config.attention_multiplier, softcap=config.attention_softcap,
        )  # fmt: skip

    @property
    def whole(self) -> KVCache:
        """The cache alone."""
        return KVCache(self.k, self.v)

    def attention(self, layer: int | Int[Array, ""], q: Float[Array, "R T N H"]) -> Float[Array, "R T N H"]:
        """Attention of the tokens to their rows, whose keys and values have been written."""
        return prefill_attention(
            q, self.k, self.v, jnp.asarray(layer, jnp.int32)[None], self.rows, self.starts, self.lengths, self.windows,
            scale=self.scale, softcap=self.softcap, interpret=jax.default_backend() == "cpu",
        )  # fmt: skip

    def _token_rows(self, count: int) -> Int[Array, " R"]:
        return self.rows
