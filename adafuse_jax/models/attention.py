"""Visibility of keys, and grouped-query attention over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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


def attention_of_lanes(q: Array, k: Array, v: Array, mask: Bool[Array, "B T S"]) -> Float[Array, "B T N H"]:
    """`attention` for use under `jax.vmap`: an axis mapped over becomes rows of one larger batch.

    cuDNN's own rule for vmap takes no mask that the heads share. The backward pass computes the forward one again.
    """
    return _lanes(q, k, v, mask)


def _over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays [B, …], one mapped axis S folded into B."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        lanes = [x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(arrays, batched, strict=True)]
        out = mapped(*(x.reshape(-1, *x.shape[2:]) for x in lanes))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


@jax.custom_vjp
def _lanes(q: Array, k: Array, v: Array, mask: Array) -> Array:
    return _over_rows(attention)(q, k, v, mask)


def _lanes_forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    return _lanes(q, k, v, mask), (q, k, v, mask)


def _lanes_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    def pull(q: Array, k: Array, v: Array, mask: Array, gradient: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)[1](gradient)

    return (*_over_rows(pull)(*saved, gradient), None)


_lanes.defvjp(_lanes_forward, _lanes_backward)
