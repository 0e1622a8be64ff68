"""Attention of one new token per row over the cache, inside the kernel.

    q, k ← rope(norm(q)), rope(norm(k));   o = softmax(q [K_cache, k]ᵀ / √H) [V_cache, v]

A unit of work is one row, one key-value head with its G query heads, and one of `splits` parts of the context. The G
queries are the first rows of a tile [HALF, H]; what its other rows hold is never used. The new key and value are not in
the cache yet: the unit of the first part begins its softmax with them. Softmax is in fp32 and base 2.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.linear import COLUMNS, ROWS, Ring, load, over_columns, over_rows, share
from pallas_kernels.decode_token.plan import HALF, PIECE, TILE, Plan

LOWEST = -1e30  # of a score: finite, so that no difference of two is NaN


def rounded(x, dtype):
    """What is left of x in `dtype`, as fp32."""
    return x.astype(dtype).astype(jnp.float32)


class Attention:
    """`memory` has `q_raw` [N, K, HALF, H], `k_raw` [N, K, H], `v_new` and `k_new` [L, N, K, H], `cache_k` and `cache_v`
    [L, B, S, K, H], `positions` [B], `windows` [L], `cos` and `sin` [N, H/2], `q_norm` and `k_norm` [L, H] or None,
    `context` [N, K, HALF, H]; with several splits `o_part` [splits, N, K, HALF, H], `max_part` and `sumax_part`
    [splits, N, K, HALF]."""

    def __init__(self, plan: Plan, memory: Any, ring: Ring, *, eps: float):
        self.plan, self.memory, self.ring, self.eps = plan, memory, ring, eps
        _, self.batch, _, self.num_kv_heads, self.head_dim = memory.cache_k.shape
        self.parts = self.head_dim // PIECE
        self.block = lax.axis_index("block")

    def _share(self, splits):
        return share(0, self.batch * self.num_kv_heads * splits, self.block, self.plan.num_blocks)

    def _unit(self, n, first, splits):
        unit = first + n * self.plan.num_blocks
        pair, split = unit // splits, unit % splits
        return pair // self.num_kv_heads, pair % self.num_kv_heads, split

    def _tiles(self, layer, row, split):
        """(first, how many) tiles of the cache belong to this part: those with positions in the window, shared evenly."""
        position = self.memory.positions[row]
        begin = jnp.maximum(position - self.memory.windows[layer] + 1, 0) // TILE
        tiles = (position + TILE - 1) // TILE - begin
        low, high = tiles * split // self.plan.splits, tiles * (split + 1) // self.plan.splits
        return begin + low, high - low

    def copy(self, layer, count):
        first, number = self._share(self.plan.splits)

        def unit(n, count):
            row, head, split = self._unit(n, first, self.plan.splits)
            start, tiles = self._tiles(layer, row, split)

            def tile(t, count):
                for cache in (self.memory.cache_k, self.memory.cache_v):
                    here = cache.at[layer, row, pl.ds((start + t) * TILE, TILE), head]
                    for columns in self._columns:
                        count = self.ring.fill(count, here.at[:, columns])
                return count

            return lax.fori_loop(0, tiles, tile, count)

        return lax.fori_loop(0, number, unit, count)

    def attend(self, layer, count, q_smem, p_smem, plain_smem):
        """`q_smem` [H / PIECE, HALF, PIECE] and `p_smem` [HALF, TILE] are operands of the tensor cores; `plain_smem`
        [HALF, PIECE] is not."""
        memory, plan = self.memory, self.plan
        first, number = self._share(plan.splits)

        def unit(n, count):
            row, head, split = self._unit(n, first, plan.splits)
            start, tiles = self._tiles(layer, row, split)
            position, window = memory.positions[row], memory.windows[layer]
            new = memory.v_new.at[layer, row, head]
            values = [load(new.at[columns], COLUMNS).astype(jnp.float32) for columns in self._columns]
            score = self._prepare(layer, row, head, split, q_smem, plain_smem)
            # Before the first tile: the new token alone for the first part, nothing for the others.
            has_new = (split == 0).astype(jnp.float32)
            o = [over_rows(value, (HALF, PIECE)) * has_new for value in values]
            m = score * has_new + LOWEST * (1 - has_new)
            total = plgpu.layout_cast(jnp.full((HALF,), 1.0, jnp.float32), ROWS) * has_new

            def tile(t, carry):
                *o, m, total, count = carry
                slots = plgpu.broadcasted_iota(jnp.int32, (HALF, TILE), 1, layout=plgpu.Layout.WGMMA)
                slots += (start + t) * TILE
                pieces = [self.ring.take(count + i) for i in range(2 * self.parts)]

                def scores(acc):
                    for part, k_smem in enumerate(pieces[: self.parts]):
                        plgpu.wgmma(acc, q_smem.at[part], k_smem.transpose((1, 0)))
                    return acc[...]

                s = pl.run_scoped(scores, plgpu.ACC((HALF, TILE), jnp.float32)) * self._scale
                s = jnp.where((slots < position) & (slots > position - window), s, LOWEST)
                m_new = jnp.maximum(m, s.max(axis=1))
                shrink = jnp.exp2(m - m_new)
                p = jnp.exp2(s - over_columns(m_new, s.shape))
                p_smem[...] = p.astype(p_smem.dtype)
                plgpu.commit_smem()
                for part, v_smem in enumerate(pieces[self.parts :]):

                    def weighted(acc, v_smem=v_smem):
                        plgpu.wgmma(acc, p_smem, v_smem)
                        return acc[...]

                    added = pl.run_scoped(weighted, plgpu.ACC((HALF, PIECE), jnp.float32))
                    o[part] = o[part] * over_columns(shrink, added.shape) + added
                for i in range(2 * self.parts):
                    self.ring.release(count + i)
                return *o, m_new, total * shrink + p.sum(axis=1), count + 2 * self.parts

            *o, m, total, count = lax.fori_loop(0, tiles, tile, (*o, m, total, count))
            if plan.splits == 1:
                self._store(memory.context.at[row, head], [x / over_columns(total, x.shape) for x in o])
            else:
                self._store(memory.o_part.at[split, row, head], o)
                memory.max_part.at[split, row, head][...] = m
                memory.sum_part.at[split, row, head][...] = total
            return count

        return lax.fori_loop(0, number, unit, count)

    def combine(self):
        """o = Σ_split 2^(m_split − m) o_split / Σ_split 2^(m_split − m) l_split."""
        memory, (first, number) = self.memory, self._share(1)

        def unit(n, _):
            row, head, _ = self._unit(n, first, 1)
            parts = [
                (load(memory.max_part.at[s, row, head], ROWS), load(memory.sum_part.at[s, row, head], ROWS))
                for s in range(self.plan.splits)
            ]
            m = parts[0][0]
            for other, _ in parts[1:]:
                m = jnp.maximum(m, other)
            weights = [jnp.exp2(m_s - m) for m_s, _ in parts]
            total = sum(weight * l_s for weight, (_, l_s) in zip(weights, parts, strict=True))
            for columns in self._columns:
                o = sum(
                    load(memory.o_part.at[s, row, head].at[:, columns]) * over_columns(weight, (HALF, PIECE))
                    for s, weight in enumerate(weights)
                )
                memory.context.at[row, head].at[:, columns][...] = (o / over_columns(total, o.shape)).astype(
                    memory.context.dtype
                )

        lax.fori_loop(0, number, unit, None)

    @property
    def _columns(self):
        """The head's dimensions in parts."""
        return [pl.ds(part * PIECE, PIECE) for part in range(self.parts)]

    def _store(self, ref, parts):
        for columns, part in zip(self._columns, parts, strict=True):
            ref.at[:, columns][...] = part.astype(ref.dtype)

    @property
    def _scale(self) -> float:
        return self.head_dim**-0.5 * math.log2(math.e)

    def _halves(self, ref):
        half = self.head_dim // 2
        return ref.at[..., pl.ds(0, half)], ref.at[..., pl.ds(half, half)]

    def _rope(self, row, pairs, norms, layer):
        """Rotate the pairs of tiles that are given by their halves, [HALF, H/2] each, after their norm, if they have one."""
        memory, shape, dtype = self.memory, (HALF, self.head_dim // 2), self.memory.q_raw.dtype
        cos, sin = (over_rows(load(x.at[row], COLUMNS), shape) for x in (memory.cos, memory.sin))
        weights = [None if norm is None else [load(w, COLUMNS) for w in self._halves(norm.at[layer])] for norm in norms]
        rotated = []
        for (first, second), weight in zip(pairs, weights, strict=True):
            if weight is not None:
                mean = ((first * first).sum(axis=1) + (second * second).sum(axis=1)) / self.head_dim
                inverse = over_columns(lax.rsqrt(mean + self.eps), shape)
                first, second = (
                    (rounded(x * inverse, dtype) * over_rows(w.astype(jnp.float32), shape))
                    for x, w in zip((first, second), weight, strict=True)
                )
                first, second = rounded(first, dtype), rounded(second, dtype)
            rotated.append((rounded(first * cos - second * sin, dtype), rounded(second * cos + first * sin, dtype)))
        return rotated

    def _prepare(self, layer, row, head, split, q_smem, plain_smem):
        """Put the queries into `q_smem`; returns their scores with the new key, [HALF]. The first part's unit also stores
        the new key."""
        memory, dtype, shape = self.memory, self.memory.q_raw.dtype, (HALF, self.head_dim // 2)
        q = [load(x).astype(jnp.float32) for x in self._halves(memory.q_raw.at[row, head])]
        k = [load(x, COLUMNS).astype(jnp.float32) for x in self._halves(memory.k_raw.at[row, head])]
        pairs = q, [over_rows(x, shape) for x in k]
        q, k = self._rope(row, pairs, (memory.q_norm, memory.k_norm), layer)
        if self.parts == 2:
            for part, x in enumerate(q):
                q_smem.at[part][...] = x.astype(dtype)
        else:  # the two halves of a tile that is stored as one
            for x, half in zip(q, self._halves(plain_smem), strict=True):
                half[...] = x.astype(dtype)
            plgpu.commit_smem()
            q_smem.at[0][...] = load(plain_smem)
        plgpu.commit_smem()

        @pl.when(split == 0)
        def _():
            for x, half in zip(k, self._halves(memory.k_new.at[layer, row, head]), strict=True):
                # the rows of the tile are equal: their mean is any of them
                half[...] = (x.sum(axis=0) / HALF).astype(dtype)

        return ((q[0] * k[0]).sum(axis=1) + (q[1] * k[1]).sum(axis=1)) * self._scale
