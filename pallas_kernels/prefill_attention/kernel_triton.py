"""Attention of a chunk of a prompt to the KV cache, in one kernel launch on any NVIDIA GPU since Ampere (Pallas, Triton).

    out_t = Σ_s softmax_s(cap(scale q_t · k_s)) v_s        over the positions s ≤ p_t, and > p_t − window

Token t of row r is at position p_t = starts[r] + t, and its keys and values are in the cache already. A program takes
`block_q` tokens of one head and reads the positions that they see, `block_k` at a time, keeping the maximum and the sum of
exponentials (flash attention): work and memory grow with the positions that are seen, not with the cache. Only the blocks at
the ends of what a program sees are masked. Programs of one head follow each other, the longest first, and share its keys in
the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.kernel_triton import LOG2_E, LOWEST
from pallas_kernels.devices import default_capability
from pallas_kernels.pregated_linear.triton_call import dot, load


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Tokens of a program, positions that it takes at a time, its warps and its pipeline stages."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def tiles_for(length: int, head_bytes: int, capability: str) -> Tiles:
    """Tiles of chunks of `length` tokens, whose keys of a head take `head_bytes` each. GPUs of compute capability 8.6, 8.9
    and 12.0 have 99 KiB of shared memory for a program; those of 9.0 have 227, and products that four warps feed best."""
    if head_bytes <= 128 or head_bytes > 256:
        block_q, num_warps, num_stages = 64, 4, 3 if head_bytes <= 128 else 2
    else:
        block_q, (num_warps, num_stages) = 128, (4, 3) if capability.startswith("9.") else (8, 2)
    if length < block_q:
        block_q, num_warps = max(16, pl.next_power_of_2(length)), 4
    return Tiles(block_q=block_q, block_k=64 if head_bytes <= 256 else 32, num_warps=num_warps, num_stages=num_stages)


def unsupported_reason(head_dim: int, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel does not support these heads, or None."""
    if head_dim < 32 or head_dim > 256 or head_dim & (head_dim - 1):
        return f"heads have {head_dim} dimensions, and attention takes 32, 64, 128 or 256"
    if jnp.dtype(dtype).itemsize != 2:
        return f"keys are {jnp.dtype(dtype).name}, whose products tensor cores would round"
    return None


def _attend_to_prefix(refs: dict[str, Any], out: Any, *, tiles: Tiles, scale: float, softcap: float | None) -> None:
    q, cache_k, cache_v, windows = (refs[name] for name in ("q", "cache_k", "cache_v", "windows"))
    length, head_dim = q.shape[1], q.shape[3]
    first = (pl.num_programs(0) - 1 - pl.program_id(0)) * tiles.block_q
    head, row = pl.program_id(1), pl.program_id(2)
    kv_head = head // (q.shape[2] // cache_k.shape[3])
    layer, cache_row, start, valid = refs["layer"][0], refs["rows"][row], refs["starts"][row], refs["lengths"][row]
    wide = (tiles.block_q, head_dim)
    place = row, pl.ds(first, tiles.block_q), head, pl.ds(0, head_dim)
    token = first + jnp.arange(tiles.block_q)
    in_chunk = jnp.broadcast_to((token < length)[:, None], wide)

    @pl.when(first >= valid)
    def _padding() -> None:
        plgpu.store(out.at[*place], jnp.zeros(wide, out.dtype), mask=in_chunk)

    @pl.when(first < valid)
    def _attend() -> None:
        queries = load(q.at[*place], jnp.broadcast_to((token < valid)[:, None], wide))
        position = start + token
        stop = start + jnp.minimum(first + tiles.block_q, valid)
        window = None if windows is None else windows[layer]
        begin, whole = start * 0, start + first + 1  # all tokens see the positions before `whole` in their window
        if window is not None:
            begin = jnp.maximum(whole - window, 0)
        masked_blocks = 0 if window is None else pl.cdiv(jnp.clip(stop - window, begin, stop) - begin, tiles.block_k)
        middle = begin + masked_blocks * tiles.block_k  # from here on nothing is behind a window
        full_blocks = jnp.maximum(whole - middle, 0) // tiles.block_k
        end = middle + full_blocks * tiles.block_k

        def block(i: Array, carry: tuple, at: Any, masked: bool) -> tuple:
            m, sum_p, total = carry
            here = at + i * tiles.block_k
            seen = here + jnp.arange(tiles.block_k)
            inside = jnp.broadcast_to((seen < stop)[:, None], (tiles.block_k, head_dim)) if masked else None
            index = layer, cache_row, pl.ds(here, tiles.block_k), kv_head, pl.ds(0, head_dim)
            scores = dot(queries, load(cache_k.at[*index], inside), trans_b=True)
            if softcap is None:
                scores *= scale * LOG2_E
            else:
                scores = softcap * LOG2_E * _tanh(scores * (scale / softcap))
            if masked:
                distance = position[:, None] - seen[None]
                visible = distance >= 0
                if window is not None:
                    visible &= distance < window
                scores = jnp.where(visible, scores, LOWEST)
            new_m = jnp.maximum(m, jnp.max(scores, axis=1))
            p = jnp.exp2(scores - new_m[:, None])
            kept = jnp.exp2(m - new_m)
            values = load(cache_v.at[*index], inside)
            return new_m, sum_p * kept + jnp.sum(p, axis=1), total * kept[:, None] + dot(p.astype(values.dtype), values)

        carry = (
            jnp.full(tiles.block_q, LOWEST, jnp.float32),
            jnp.zeros(tiles.block_q, jnp.float32),
            jnp.zeros(wide, jnp.float32),
        )
        if window is not None:
            carry = lax.fori_loop(0, masked_blocks, partial(block, at=begin, masked=True), carry)
        carry = lax.fori_loop(0, full_blocks, partial(block, at=middle, masked=False), carry)
        last_blocks = pl.cdiv(jnp.maximum(stop - end, 0), tiles.block_k)
        _, sum_p, total = lax.fori_loop(0, last_blocks, partial(block, at=end, masked=True), carry)
        plgpu.store(out.at[*place], (total / sum_p[:, None]).astype(out.dtype), mask=in_chunk)


def _tanh(x: Array) -> Array:
    return 1 - 2 / (jnp.exp2(2 * LOG2_E * x) + 1)


@partial(jax.jit, static_argnames=("scale", "softcap", "tiles", "interpret"))
def prefill_attention(
    q: Float[Array, "R T N H"],
    cache_k: Float[Array, "L B S K H"],
    cache_v: Float[Array, "L B S K H"],
    layer: Int[Array, 1],
    rows: Int[Array, " R"],
    starts: Int[Array, " R"],
    lengths: Int[Array, " R"],
    windows: Int[Array, " L"] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "R T N H"]:
    """Attention of T tokens of R rows to what the cache has of them. Queries behind a row's length get any finite number.

    Args:
      q: rotated queries.
      cache_k, cache_v: rotated keys, and values, of all layers and slots, those of these tokens among them.
      rows: slot of every row.
      starts: position of the first token of every row.
      lengths: tokens of every row, at most T; starts + lengths is at most S.
      windows: positions that a token of each layer sees, itself included; None is all.
      scale: of the scores; None is 1/√H.
      softcap: c of c · tanh(score / c); None is no cap.
    """
    num_rows, length, num_heads, head_dim = q.shape
    tiles = tiles or tiles_for(length, head_dim * cache_k.dtype.itemsize, default_capability())
    refs: dict[str, Any] = {"q": q, "cache_k": cache_k, "cache_v": cache_v, "layer": layer, "rows": rows}
    refs |= {"starts": starts, "lengths": lengths, "windows": windows}
    kernel = partial(
        _attend_to_prefix, tiles=tiles, scale=head_dim**-0.5 if scale is None else scale, softcap=softcap
    )  # fmt: skip
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(pl.cdiv(length, tiles.block_q), num_heads, num_rows),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret, name="prefill_attention",
    )(refs)  # fmt: skip
