"""Attention of one new token per row over the cache, inside the kernel.

    q, k ← rope(norm(q)), rope(norm(k));   o = softmax(q [K_cache, k]ᵀ / √H) [V_cache, v]

A unit of work is one row, up to QUERIES query heads of one key-value head, and one of `splits` parts of the context. As
with the linears, what comes from the cache is the tensor cores' left operand, halves of tiles, and the queries are columns:

    sᵀ = K qᵀ [positions, QUERIES],    oᵀ = Vᵀ pᵀ [H, QUERIES]

What the columns of queries that do not exist hold is never used. The new key and value are not in the cache yet: the unit
of the first part begins its softmax with them. Softmax is in fp32 and base 2.

If o is `attended`, as of most single rows whose context has one part, a unit's context is a slice of o_proj's input, and
all blocks that multiply it attend to the unit themselves: the heads' keys and values come from the L2 cache then, and
nobody waits for others' context.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.plan import HALF, PIECE, QUERIES, TILE, Plan, div
from pallas_kernels.decode_token.ring import Filled, Ring
from pallas_kernels.decode_token.shares import divmod_, pick, share
from pallas_kernels.decode_token.tiles import (
    COLUMNS,
    ROWS,
    column,
    load,
    load_transposed,
    over_columns,
    over_rows,
    store,
    store_transposed,
)

LOWEST = -1e30  # of a score: finite, so that no difference of two is NaN
SHAPE = HALF, QUERIES


def rounded(x, dtype):
    """What is left of x in `dtype`, as fp32."""
    return x.astype(dtype).astype(jnp.float32)


class Attention:
    """`memory` has `q_raw` [heads + QUERIES, N, 2 PIECE] and `k_raw` [K, N, 2 PIECE], with heads of PIECE dimensions twice,
    one after the other; `v_new` and `k_new` [L, N, K, H], `cache_k` and `cache_v` [L, B, S, K, H], `positions` [B],
    `windows` [L], `cos` and `sin` [N, H], with the sign of the first half's partner in `sin`; `q_norm` and `k_norm`
    [L, 2 PIECE] or None, laid out as q; `context` [pieces · N, PIECE]; with several splits `o_part` [splits, N, groups,
    H / PIECE, HALF, QUERIES], `max_part` and `sum_part` [splits, N, groups, QUERIES]; the `scalars`. `group_size`: query
    heads of a key."""

    def __init__(self, plan: Plan, memory: Any, ring: Ring, *, group_size: int, eps: float):
        self.plan, self.memory, self.ring, self.group_size, self.eps = plan, memory, ring, group_size, eps
        _, self.batch, _, self.num_kv_heads, self.head_dim = memory.cache_k.shape
        self.parts = self.head_dim // PIECE
        self.groups = -(-group_size // QUERIES)
        self.block = lax.axis_index("block")

    def _share(self, splits):
        units = self.batch * self.num_kv_heads * self.groups * splits
        return share(0, units, self.block, self.plan.num_blocks)

    def _unit(self, number, splits):
        """(row, key-value head, group of its queries, part of the context)."""
        unit, split = divmod_(number, splits)
        unit, group = divmod_(unit, self.groups)
        return *divmod_(unit, self.num_kv_heads), group, split

    def _tiles(self, position, window, split):
        """(first, how many) tiles of the cache belong to this part: those with positions in the window, shared evenly."""
        begin = div(jnp.maximum(position - window + 1, 0), TILE)
        tiles = div(position + TILE - 1, TILE) - begin
        low, high = (div(tiles * i, self.plan.splits) for i in (split, split + 1))
        return begin + low, high - low

    def copy(self, layer, filled: Filled) -> Filled:
        first, number = self._share(self.plan.splits)

        def unit(n, filled):
            return self._copy_unit(layer, self._unit(first + n * self.plan.num_blocks, self.plan.splits), filled)

        return lax.fori_loop(0, number, unit, filled)

    def _copy_unit(self, layer, unit, filled: Filled) -> Filled:
        row, head, _, split = unit
        start, tiles = self._tiles(pick(self.memory.scalars.positions, row), self.memory.windows[layer], split)

        def part(n):
            tile, place = divmod_(n, 2 * self.parts)
            kind, at = divmod_(place, self.parts)
            rows = pl.ds((start + tile) * TILE, TILE)

            def of(cache):
                return lambda: (cache.at[layer, row, rows, head, pl.ds(at * PIECE, PIECE)],)

            return [of(self.memory.cache_k), of(self.memory.cache_v)], kind

        return self.ring.fill(filled, tiles * 2 * self.parts, part)

    def attend(self, layer, count, q_smem, p_smem):
        """`q_smem` [H / PIECE, QUERIES, PIECE] and `p_smem` [TILE / PIECE, QUERIES, PIECE] are operands of the tensor
        cores."""
        memory, plan = self.memory, self.plan
        first, number = self._share(plan.splits)

        def unit(n, count):
            row, head, group, split = unit = self._unit(first + n * plan.num_blocks, plan.splits)
            o, m, total, count = self._attend(layer, count, unit, q_smem, p_smem)
            if plan.splits == 1:
                self._store(row, head, group, [x / over_rows(total, SHAPE) for x in o])
            else:
                place = split, row, head * self.groups + group
                for part, x in enumerate(o):
                    store(memory.o_part.at[*place, part], x)
                store(memory.max_part.at[*place], m)
                store(memory.sum_part.at[*place], total)
            return count

        return lax.fori_loop(0, number, unit, count)

    def copy_own(self, layer, own, filled: Filled) -> Filled:
        """What `attend_own` takes from the ring."""
        number, needed = own

        def copy(_, filled):
            return self._copy_unit(layer, self._unit(number, 1), filled)

        return lax.fori_loop(0, jnp.where(needed, 1, 0), copy, filled)

    def attend_own(self, layer, count, own, operand_smem, q_smem, p_smem):
        """The context of one unit of a single row, as o_proj's right operand: a chunk for each part of each query head."""
        number, needed = own

        def attend(_, count):
            o, _, total, count = self._attend(layer, count, self._unit(number, 1), q_smem, p_smem)
            o = [x / over_rows(total, SHAPE) for x in o]
            plgpu.commit_smem()  # all warps are done with what takes the same place
            for query in range(self._queries):
                for part, x in enumerate(o):
                    context = over_columns(column(x, query), SHAPE) if self._queries > 1 else x
                    store_transposed(operand_smem.at[pl.ds((query * self.parts + part) * QUERIES, QUERIES)], context)
            plgpu.commit_smem()
            return count

        return lax.fori_loop(0, jnp.where(needed, 1, 0), attend, count)

    def _attend(self, layer, count, unit, q_smem, p_smem):
        """(oᵀ before it is divided by the sum of its weights, by part; their maximum; the sum; the new count)."""
        memory, (row, head, group, split) = self.memory, unit
        position, window = memory.positions[row], memory.windows[layer]
        start, tiles = self._tiles(position, window, split)
        values = [load(memory.v_new.at[layer, row, head, c], ROWS).astype(jnp.float32) for c in self._columns]
        score = self._prepare(layer, row, head, group, split, q_smem)
        # Before the first tile: the new token alone for the first part, nothing for the others.
        has_new = jnp.float32(split == 0)
        o = [over_columns(value, SHAPE) * has_new for value in values]
        m = score * has_new + LOWEST * (1 - has_new)
        total = plgpu.layout_cast(jnp.full((QUERIES,), 1.0, jnp.float32), COLUMNS) * has_new
        more = over_rows(total, SHAPE) * 0  # weights that are not summed over the rows yet: once, after the loop

        def tile(t, carry):
            *o, m, total, more, count = carry
            pieces = [self.ring.take(count + i) for i in range(2 * self.parts)]
            scores = []
            for half in (0, 1):
                s = self._product(
                    (k_smem.at[pl.ds(half * HALF, HALF)], q_smem.at[part])
                    for part, k_smem in enumerate(pieces[: self.parts])
                )
                slots = plgpu.broadcasted_iota(jnp.int32, SHAPE, 0, layout=plgpu.Layout.WGMMA)
                slots += (start + t) * TILE + half * HALF
                seen = (slots < position) & (slots > position - window)
                scores.append(jnp.where(seen, s * self._scale, LOWEST))
            m_new = jnp.maximum(m, jnp.maximum(*scores).max(axis=0))
            shrink = jnp.exp2(m - m_new)
            weights = [jnp.exp2(s - over_rows(m_new, SHAPE)) for s in scores]
            for half, p in enumerate(weights):
                store_transposed(p_smem.at[half], p)
            plgpu.commit_smem()
            for part, v_smem in enumerate(pieces[self.parts :]):
                added = self._product(
                    (v_smem.at[pl.ds(half * HALF, HALF)].transpose((1, 0)), p_smem.at[half]) for half in (0, 1)
                )
                o[part] = o[part] * over_rows(shrink, SHAPE) + added
            for i in range(2 * self.parts):
                self.ring.release(count + i)
            more = more * over_rows(shrink, SHAPE) + weights[0] + weights[1]
            return *o, m_new, total * shrink, more, count + 2 * self.parts

        *o, m, total, more, count = lax.fori_loop(0, tiles, tile, (*o, m, total, more, count))
        return o, m, total + more.sum(axis=0), count

    @property
    def _queries(self) -> int:
        """Query heads of a unit, if all units have as many."""
        return min(QUERIES, self.group_size)

    def _query_head(self, head, group, query):
        return head * self.group_size + group * QUERIES + query

    def combine(self):
        """o = Σ_split 2^(m_split − m) o_split / Σ_split 2^(m_split − m) l_split."""
        memory, (first, number) = self.memory, self._share(1)

        def unit(n, _):
            row, head, group, _ = self._unit(first + n * self.plan.num_blocks, 1)
            places = [(s, row, head * self.groups + group) for s in range(self.plan.splits)]
            maxima, sums = ([load(ref.at[*p], COLUMNS) for p in places] for ref in (memory.max_part, memory.sum_part))
            m = maxima[0]
            for other in maxima[1:]:
                m = jnp.maximum(m, other)
            weights = [jnp.exp2(m_s - m) for m_s in maxima]
            total = over_rows(sum(weight * l_s for weight, l_s in zip(weights, sums, strict=True)), SHAPE)
            o = [
                sum(
                    load(memory.o_part.at[*p, part]) * over_rows(weight, SHAPE)
                    for p, weight in zip(places, weights, strict=True)
                )
                for part in range(self.parts)
            ]
            self._store(row, head, group, [x / total for x in o])

        lax.fori_loop(0, number, unit, None)

    @property
    def _columns(self):
        """The head's dimensions in parts."""
        return [pl.ds(part * PIECE, PIECE) for part in range(self.parts)]

    def _product(self, pairs):
        """Σ left · rightᵀ, [HALF, QUERIES]."""
        pairs = list(pairs)

        def product(acc):
            for left, right in pairs:
                plgpu.wgmma(acc, left, right.transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC(SHAPE, jnp.float32))

    def _store(self, row, head, group, o):
        """The columns of oᵀ, one for each query head, into the context."""
        memory = self.memory
        for query in range(self._queries):
            query_head = self._query_head(head, group, query)

            def store_query(query=query, query_head=query_head):
                for part, x in enumerate(o):
                    target = (query_head * self.parts + part) * self.plan.columns + row
                    store(memory.context.at[target], column(x, query).astype(memory.context.dtype))

            if self.group_size % QUERIES == 0 or self.groups == 1:
                store_query()
            else:
                pl.when(group * QUERIES + query < self.group_size)(store_query)

    @property
    def _scale(self) -> float:
        return self.head_dim**-0.5 * math.log2(math.e)

    def _with_partners(self, read):
        """By part of the head: what `read` gives for its dimensions, and for those that they are rotated with."""
        starts = [part * PIECE for part in range(self.parts)]
        partners = [(start + self.head_dim // 2) % (2 * PIECE) for start in starts]
        return [tuple(read(pl.ds(at, PIECE)) for at in pair) for pair in zip(starts, partners, strict=True)]

    def _rope(self, layer, row, parts, norm):
        """Rotate a head, given in parts with their partners, after its norm, if it has one."""
        dtype = self.memory.q_raw.dtype
        if norm is not None:
            mean = sum((own * own).sum(axis=0) for own, _ in parts) / self.head_dim
            inverse = over_rows(lax.rsqrt(mean + self.eps), SHAPE)
            weights = self._with_partners(lambda columns: load(norm.at[layer, columns], ROWS))
            parts = [
                tuple(
                    rounded(rounded(x * inverse, dtype) * over_columns(w.astype(jnp.float32), SHAPE), dtype)
                    for x, w in zip(pair, weight, strict=True)
                )
                for pair, weight in zip(parts, weights, strict=True)
            ]
        rotated = []
        for (own, partner), columns in zip(parts, self._columns, strict=True):
            cos, sin = (over_columns(load(x.at[row, columns], ROWS), SHAPE) for x in (self.memory.cos, self.memory.sin))
            rotated.append(rounded(own * cos + partner * sin, dtype))
        return rotated

    def _prepare(self, layer, row, head, group, split, q_smem):
        """Put the queries into `q_smem`; returns their scores with the new key, [QUERIES]. The first part's unit of the
        first group also stores the new key."""
        memory = self.memory
        first = head * self.group_size + group * QUERIES
        q = self._with_partners(
            lambda columns: load_transposed(memory.q_raw.at[pl.ds(first, QUERIES), row, columns]).astype(jnp.float32)
        )
        k = self._with_partners(
            lambda columns: over_columns(load(memory.k_raw.at[head, row, columns], ROWS).astype(jnp.float32), SHAPE)
        )
        q, k = self._rope(layer, row, q, memory.q_norm), self._rope(layer, row, k, memory.k_norm)
        for part, x in enumerate(q):
            store_transposed(q_smem.at[part], x)
        plgpu.commit_smem()

        @pl.when((split == 0) & (group == 0))
        def _():
            for columns, x in zip(self._columns, k, strict=True):
                store(memory.k_new.at[layer, row, head, columns], column(x, 0).astype(memory.k_new.dtype))

        return sum((x * y).sum(axis=0) for x, y in zip(q, k, strict=True)) * self._scale
