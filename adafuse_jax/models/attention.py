"""Visibility of keys, and grouped-query attention over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Visibility:
    """Index of every query and key on a common axis, and whether they may meet at all (same segment, or in the cache).

    A query at index q sees a key at index s iff `allowed`, s ≤ q, and q − s < window.
    """

    query_index: Int[Array, "B T"]
    key_index: Int[Array, " S"]
    allowed: Bool[Array, "B T S"] | None

    @classmethod
    def of_sequence(cls, length: int, segment_ids: Int[Array, "B T"] | None) -> Visibility:
        """A forward pass without a cache: causal, within equal `segment_ids` (all of them, if None)."""
        index = jnp.arange(length)
        allowed = None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
        return cls(index[None], index, allowed)

    @classmethod
    def of_cache(cls, positions: Int[Array, "B T"], slots: int) -> Visibility:
        """Queries at `positions` over a cache in which slot s holds position s."""
        return cls(positions, jnp.arange(slots), None)

    def mask(self, window: Int[Array, ""] | None) -> Bool[Array, "B T S"]:
        distance = self.query_index[:, :, None] - self.key_index
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        return seen if self.allowed is None else seen & self.allowed


def flash_attention_fits(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> bool:
    """True where cuDNN's fused attention runs: on a CUDA GPU, 16-bit, T and S even, H a multiple of 8 up to 128.

    A single query, odd, is a matrix-vector product, which it would not help.
    """
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    return jax.default_backend() == "gpu" and sixteen_bit and even and q.shape[3] % 8 == 0 and q.shape[3] <= 128


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v, each group of N/K query heads sharing one key/value head; softmax in fp32.

    A query that sees no key (padding) gets some finite average, never NaN. Where `flash_attention_fits`, cuDNN computes
    it without the [B, N, T, S] scores; elsewhere XLA does.
    """
    mask = jnp.broadcast_to(mask[:, None], (q.shape[0], 1, q.shape[1], k.shape[1]))
    implementation: Literal["cudnn", "xla"] = "cudnn" if flash_attention_fits(q, k) else "xla"
    if q.dtype == jnp.float16 and jax.default_backend() == "cpu":  # where XLA has no float16 product with sums in fp32
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
        return jax.nn.dot_product_attention(q32, k32, v32, mask=mask, implementation="xla").astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
