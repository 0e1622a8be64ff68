"""Attention of one token of every row to its cache, in one kernel launch on any NVIDIA GPU since Ampere (Pallas, Triton).

    q, k ← rope(norm(q)), rope(norm(k));   cache[position] ← k, v;   out = Σ_s softmax_s(cap(m q · k_s)) v_s

over the positions s that the token sees, position − window < s ≤ position: what the cache has besides is not read. Programs
share the positions of a key-value head (flash-decoding): each has a maximum m, a sum of exponentials and an output of its
own, and the last to end puts them together; none waits. All query heads of a key-value head are the rows, padded to 16, of
one product.
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

from pallas_kernels.pregated_linear.triton_call import dot, launch, load

LOG2_E = 1.4426950408889634
LOWEST = -1e30
"""Scores of positions out of range: not −∞, whose differences are NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Programs of a key-value head at most, positions that one takes at a time, and its warps and pipeline stages."""

    max_splits: int
    block: int
    num_warps: int = 4
    num_stages: int = 2


def tiles_for(batch: int, num_kv_heads: int, slots: int, head_bytes: int) -> Tiles:
    """Programs enough for a GPU of 132 multiprocessors or so, and no more than there are blocks in the cache. Blocks of wide
    heads are shorter, as GPUs of compute capability 8.6, 8.9 and 12.0 have 99 KiB of shared memory for a program."""
    block = 32 if batch * num_kv_heads <= 64 or head_bytes > 512 else 64
    wanted = pl.cdiv(512, batch * num_kv_heads)
    return Tiles(max_splits=max(1, min(wanted, slots // block, 64)), block=block)


def unsupported_reason(head_dim: int) -> str | None:
    """The reason why the kernel does not support these heads, or None."""
    if head_dim < 32 or head_dim > 256 or head_dim & (head_dim - 1):
        return f"heads have {head_dim} dimensions, and attention takes 32, 64, 128 or 256"
    return None


def _attend_to_cache(
    refs: dict[str, Any],
    outs: dict[str, Any],
    *,
    tiles: Tiles,
    eps: float,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> None:
    row, head, split = (pl.program_id(axis) for axis in range(3))
    cache_k, cache_v, layer = outs["cache_k"], outs["cache_v"], refs["layer"][0]
    slots, head_dim = cache_k.shape[2], cache_k.shape[4]
    position, zero = refs["position"][row], row * 0
    stop = jnp.minimum(position + 1, slots)
    start = jnp.maximum(stop - refs["window"][layer], 0)
    blocks = pl.cdiv(stop - start, tiles.block)
    of_split = pl.cdiv(blocks, tiles.max_splits)  # blocks of one program
    num_splits = pl.cdiv(blocks, of_split)
    group = refs["q"].shape[1] // refs["k"].shape[1]  # query heads of a key-value head
    padded = max(16, pl.next_power_of_2(group))
    in_group = jnp.arange(padded) < group
    cos, sin = refs["cos"][row], refs["sin"][row]  # [H/2]

    def rotated(name: str, at: tuple, mask: Array | None) -> tuple[Array, Array]:
        """The halves of q or k of the token, normed and rotated, in fp32."""
        half = head_dim // 2
        parts = [
            load(refs[name].at[*at, pl.ds(i * half, half)], mask).astype(jnp.float32) for i in range(2)
        ]  # fmt: skip
        if (norm := refs[f"{name}_norm"]) is not None:
            squares = sum(jnp.sum(x * x, axis=-1, keepdims=True) for x in parts)
            inverse = lax.rsqrt(squares / head_dim + eps)
            dtype = refs[name].dtype
            parts = [
                ((x * inverse).astype(dtype) * norm[layer, pl.ds(i * half, half)]).astype(jnp.float32)
                for i, x in enumerate(parts)
            ]
        first, second = parts
        return first * cos - second * sin, second * cos + first * sin

    first_position = start + split * of_split * tiles.block
    stop_here = jnp.minimum(first_position + of_split * tiles.block, stop)

    @pl.when(split < num_splits)
    def _attend() -> None:
        half, dtype = head_dim // 2, cache_k.dtype

        @pl.when((stop_here == stop) & (position < slots))
        def _write() -> None:
            for i, part in enumerate(rotated("k", (row, head), None)):
                plgpu.store(cache_k.at[layer, row, position, head, pl.ds(i * half, half)], part.astype(dtype))
            plgpu.store(cache_v.at[layer, row, position, head, pl.ds(0, head_dim)], refs["v"][row, head].astype(dtype))
            if not interpret:
                plgpu.debug_barrier()  # it is read below

        mask = jnp.broadcast_to(in_group[:, None], (padded, half))
        q = [part.astype(dtype) for part in rotated("q", (row, pl.ds(head * group, padded)), mask)]  # 2 · [padded, H/2]

        def exponents(scores: Array) -> Array:
            """log₂ of what the softmax adds up."""
            if softcap is None:
                return scores * (LOG2_E * scale)
            return jnp.tanh(scores * (scale / softcap)) * (LOG2_E * softcap)

        def block(i: Array, carry: tuple) -> tuple:
            m, sum_p, total = carry
            begin = first_position + i * tiles.block
            inside = begin + jnp.arange(tiles.block) < stop_here
            wide = jnp.broadcast_to(inside[:, None], (tiles.block, half))
            scores = jnp.zeros((padded, tiles.block), jnp.float32)
            for at, part in enumerate(q):
                keys = cache_k.at[layer, row, pl.ds(begin, tiles.block), head, pl.ds(at * half, half)]
                scores += dot(part, load(keys, wide), trans_b=True)
            scores = jnp.where(inside[None], exponents(scores), LOWEST)
            new_m = jnp.maximum(m, jnp.max(scores, axis=1))
            p = jnp.exp2(scores - new_m[:, None])
            kept = jnp.exp2(m - new_m)
            wide = jnp.broadcast_to(inside[:, None], (tiles.block, head_dim))
            values = load(cache_v.at[layer, row, pl.ds(begin, tiles.block), head, pl.ds(0, head_dim)], wide)
            return new_m, sum_p * kept + jnp.sum(p, axis=1), total * kept[:, None] + dot(p.astype(dtype), values)

        carry = jnp.full(padded, LOWEST, jnp.float32), jnp.zeros(padded), jnp.zeros((padded, head_dim), jnp.float32)
        m, sum_p, total = lax.fori_loop(0, pl.cdiv(stop_here - first_position, tiles.block), block, carry)
        mask = jnp.broadcast_to(in_group[:, None], (padded, head_dim))
        out = outs["out"].at[row, pl.ds(head * group, padded), pl.ds(0, head_dim)]

        @pl.when(num_splits == 1)
        def _alone() -> None:
            plgpu.store(out, (total / sum_p[:, None]).astype(outs["out"].dtype), mask=mask)

        @pl.when(num_splits > 1)
        def _together() -> None:
            plgpu.store(outs["total"].at[row, head, split], total)
            plgpu.store(outs["m"].at[row, head, split], m)
            plgpu.store(outs["sum_p"].at[row, head, split], sum_p)
            if not interpret:
                plgpu.debug_barrier()  # all of it is stored before it counts
            ended = plgpu.atomic_add(outs["ended"], (row, head), zero + 1)

            @pl.when(ended == num_splits - 1)
            def _combine() -> None:
                plgpu.store(outs["ended"].at[row, head], zero)  # for the next launch

                def add(i: Array, carry: tuple) -> tuple:
                    m, sum_p, total = carry
                    m_i, sum_i, total_i = (plgpu.load(outs[name].at[row, head, i]) for name in ("m", "sum_p", "total"))
                    new_m = jnp.maximum(m, m_i)
                    kept, more = jnp.exp2(m - new_m), jnp.exp2(m_i - new_m)
                    return new_m, sum_p * kept + sum_i * more, total * kept[:, None] + total_i * more[:, None]

                _, sum_p, total = lax.fori_loop(0, num_splits, add, carry)
                plgpu.store(out, (total / sum_p[:, None]).astype(outs["out"].dtype), mask=mask)


@partial(jax.jit, static_argnames=("eps", "scale", "softcap", "tiles", "interpret"))
def decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cache_k: Float[Array, "L B S K H"],
    cache_v: Float[Array, "L B S K H"],
    layer: Int[Array, 1],
    position: Int[Array, " B"],
    cos: Float[Array, "B H/2"],
    sin: Float[Array, "B H/2"],
    windows: Int[Array, " L"],
    ended: Int[Array, "B K"],
    *,
    q_norm: Float[Array, "L H"] | None = None,
    k_norm: Float[Array, "L H"] | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Array, Array, Array]:
    """(out, cache_k, cache_v, ended). A token whose position is ≥ S is not written, and its output is any finite number.

    Args:
      windows: positions that a token of each layer sees, itself included.
      ended: zeros, before and after.
      q_norm, k_norm: weights of an RMS norm of every head, before the rotation.
      scale: m, None is 1/√H; `softcap`: c in cap(z) = c · tanh(z / c), None is none.
    """
    batch, num_kv_heads, head_dim = k.shape
    tiles = tiles or tiles_for(batch, num_kv_heads, cache_k.shape[2], head_dim * cache_k.dtype.itemsize)
    padded = max(16, pl.next_power_of_2(q.shape[1] // num_kv_heads))
    refs: dict[str, Any] = {
        "cache_k": cache_k,
        "cache_v": cache_v,
        "ended": ended,
        "q": q,
        "k": k,
        "v": v,
        "layer": layer,
    }
    refs |= {"position": position, "cos": cos, "sin": sin, "window": windows, "q_norm": q_norm, "k_norm": k_norm}
    parts = batch, num_kv_heads, tiles.max_splits, padded
    outs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in (("cache_k", cache_k), ("cache_v", cache_v))}
    outs |= {"ended": jax.ShapeDtypeStruct(ended.shape, ended.dtype), "out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    outs |= {name: jax.ShapeDtypeStruct(parts, jnp.float32) for name in ("m", "sum_p")}
    outs["total"] = jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32)
    scale = head_dim**-0.5 if scale is None else scale
    kernel = partial(_attend_to_cache, tiles=tiles, eps=eps, scale=scale, softcap=softcap, interpret=interpret)
    found = launch(
        kernel, refs, outs, grid=(batch, num_kv_heads, tiles.max_splits), updated=("cache_k", "cache_v", "ended"),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, interpret=interpret,
    )  # fmt: skip
    return found["out"], found["cache_k"], found["cache_v"], found["ended"]
