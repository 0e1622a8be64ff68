"""Grouped-query attention over a sequence or over a cache, by cuDNN's kernels where they run and by XLA elsewhere.

    out_t = Σ_s softmax_s(cap(m q_t · k_s)) v_s        over the keys s that query t sees; by default m = 1/√H, cap(z) = z

    implementation   needs                                              [B, T, S] mask
    cudnn_causal     a sequence of one segment, any sliding window      no
    cudnn_packed     a sequence of at most M segments, Hopper or newer  no: work grows with the segments' own lengths
    cudnn_masked     anything                                           yes
    xla              anything, on every device                          yes, and [B, N, T, S] scores

cuDNN needs an NVIDIA GPU, 16-bit inputs, T and S even, head_dim a multiple of 8 up to 128, and no soft cap.
`implementation_of` chooses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.models.layers import softcapped

Implementation = Literal["cudnn_causal", "cudnn_packed", "cudnn_masked", "xla"]
MAX_HEAD_DIM = 128
MAX_PACKED_SEGMENTS = 64
"""Segments of a row above which the packed kernels, whose statistics are [B · M, N, T], lose to a mask."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Visibility:
    """Index of every query and key on a common axis, and the segments of a sequence.

    A query at index q sees a key at index s iff s ≤ q, q − s < window, and their segments are equal.
    """

    query_index: Int[Array, "#B T"]
    key_index: Int[Array, " S"]
    segment_ids: Int[Array, "B T"] | None = None
    """Segments of a sequence: runs of equal ids. None is one segment."""
    max_segments: int | None = field(default=None, metadata={"static": True})
    """Most segments of a row, padding not counted; None is unknown. With 1 the padding must follow the segment."""
    is_sequence: bool = field(default=False, metadata={"static": True})
    """Keys are those of the queries' own sequence, from its first token."""

    @classmethod
    def of_sequence(
        cls, length: int, segment_ids: Int[Array, "B T"] | None = None, max_segments: int | None = None
    ) -> Visibility:
        """A forward pass without a cache: causal, within equal `segment_ids` (all of them, if None)."""
        index = jnp.arange(length)
        return cls(index[None], index, segment_ids, max_segments, is_sequence=True)

    @classmethod
    def of_cache(cls, positions: Int[Array, "B T"], slots: int) -> Visibility:
        """Queries at `positions` over a cache in which slot s holds position s."""
        return cls(positions, jnp.arange(slots))

    def mask(self, window: int | None = None) -> Bool[Array, "#B T S"]:
        distance = self.query_index[:, :, None] - self.key_index
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if self.segment_ids is None:
            return seen
        return seen & (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])


def implementation_of(
    q: Float[Array, "B T N H"] | jax.ShapeDtypeStruct,
    k: Float[Array, "B S K H"] | jax.ShapeDtypeStruct,
    visibility: Visibility,
    window: int | None = None,
    softcap: float | None = None,
) -> Implementation:
    """The implementation that `attention` uses for these shapes and types on the default device.

    A single query, odd, is a matrix-vector product, which cuDNN would not help.
    """
    sixteen_bit, even = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits = sixteen_bit and even and q.shape[3] % 8 == 0 and q.shape[3] <= MAX_HEAD_DIM
    if jax.default_backend() != "gpu" or not fits or softcap is not None:
        return "xla"
    if visibility.is_sequence:
        segments = 1 if visibility.segment_ids is None else visibility.max_segments
        if segments == 1:
            return "cudnn_causal"
        fits = math.prod(q.shape) < 2**31  # its offsets are 32-bit
        if fits and segments is not None and segments <= MAX_PACKED_SEGMENTS and window is None and is_hopper():
            return "cudnn_packed"
    return "cudnn_masked"


def is_hopper() -> bool:
    """True on a GPU of compute capability 9.0 or above."""
    return float(jax.devices()[0].compute_capability) >= 9


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visibility: Visibility,
    window: int | None = None,
    implementation: Implementation | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(cap(scale · q kᵀ)) v, each group of N/K query heads sharing one key/value head; softmax in fp32.

    A query that sees no key (padding) gets some finite average, never NaN.

    Args:
      q, k, v: queries, keys and values.
      visibility: the keys that each query sees.
      window: a query sees the last `window` positions, itself included; None is all.
      implementation: one of the table above; None is that of `implementation_of`.
      scale: of the scores; None is 1/√H.
      softcap: c of c · tanh(score / c), by `xla` alone; None is none.
    """
    if window is not None and window >= k.shape[1]:
        window = None
    implementation = implementation or implementation_of(q, k, visibility, window, softcap)
    attend, dtype = partial(jax.nn.dot_product_attention, scale=scale), q.dtype
    if implementation == "cudnn_causal":
        left = None if window is None else (window - 1, 0)
        return attend(q, k, v, is_causal=True, local_window_size=left, implementation="cudnn")
    if implementation == "cudnn_packed":
        return _packed(q, k, v, visibility, scale)
    mask = visibility.mask(window)[:, None]  # [B or 1, 1, T, S]
    mask = jnp.broadcast_to(mask, (q.shape[0], 1, q.shape[1], k.shape[1]))
    if implementation == "cudnn_masked":
        return attend(q, k, v, mask=mask, implementation="cudnn")
    if q.dtype == jnp.float16 and jax.default_backend() == "cpu":  # where XLA has no float16 product with sums in fp32
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if softcap is not None:
        return _softcapped(q, k, v, mask[:, 0], scale, softcap).astype(dtype)
    return attend(q, k, v, mask=mask, implementation="xla").astype(dtype)


def _softcapped(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    scale: float | None,
    softcap: float,
) -> Float[Array, "B T N H"]:
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])  # [B, T, K, N/K, H]
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("btkgh,bskh->bkgts", grouped, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = jnp.where(mask[:, None, None], softcapped(scores, softcap), jnp.finfo(jnp.float32).min)
    out = product("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return out.reshape(q.shape)


def _packed(q: Array, k: Array, v: Array, visibility: Visibility, scale: float | None) -> Array:
    # Its packed form has no public name
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    assert visibility.segment_ids is not None
    assert visibility.max_segments is not None
    lengths, starts = segments(visibility.segment_ids, visibility.max_segments + 1)  # padding is one more
    return dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, mask_type=MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def segments(segment_ids: Int[Array, "B T"], count: int) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"]]:
    """Length and start of every run of equal ids in a row, in order, −1 behind the last; `count` is M, the most runs."""
    is_start = jnp.concatenate([jnp.ones_like(segment_ids[:, :1]), jnp.diff(segment_ids, axis=1) != 0], axis=1)
    ordinal = jnp.cumsum(is_start, axis=1) - 1  # [B, T]
    lengths = jnp.sum(ordinal[:, :, None] == jnp.arange(count), axis=1, dtype=jnp.int32)  # [B, M]
    ends = jnp.cumsum(lengths, axis=1, dtype=jnp.int32)
    is_there = lengths > 0
    starts = jnp.where(is_there, ends - lengths, -1)
    return jnp.where(is_there, lengths, -1), jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
