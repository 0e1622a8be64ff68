"""Attention of one new token per row over the cache, inside the kernel.

    q, k ← rope(norm(q)), rope(norm(k));   o = softmax(cap(m q [K_cache, k]ᵀ)) [V_cache, v]      usually m = 1/√H

A unit of work is one row, up to WGMMA_N query heads of one key-value head, and one of `context_splits` parts of the
context. As with the linears, the tensor cores' left operand is what comes from the cache, halves of tiles, and queries
are columns:

    sᵀ = K qᵀ [positions, WGMMA_N],    oᵀ = Vᵀ pᵀ [H, WGMMA_N]

The columns of queries that do not exist are never used. The new key and value are not in the cache yet: the unit of the
first part begins its softmax with them. Softmax is in fp32 and base 2.

With fused attention (most batches of one whose context has one part), a unit's context is a slice of o_proj's input,
and all CTAs that multiply that slice compute the unit themselves: the heads' keys and values come from the L2 cache
then, and no CTA waits for others' context.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.activations import softcapped
from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.pipeline import Pipeline, ProducerState
from pallas_kernels.megakernel.plan import Plan
from pallas_kernels.megakernel.register_tiles import (
    COLUMNS,
    ROWS,
    column,
    load,
    load_transposed,
    over_columns,
    over_rows,
    rounded,
    store,
    store_transposed,
)
from pallas_kernels.megakernel.schedule import AttentionSchedule, Scalars, div_rem, select
from pallas_kernels.megakernel.sizes import TILE_K, TILE_M, WGMMA_M, WGMMA_N, stored_head_dim

LOWEST_SCORE = -1e30  # finite, so that no difference of two is NaN
SHAPE = WGMMA_M, WGMMA_N


class Attention:
    """`buffers` as in `buffers.TABLE`; heads of TILE_K dimensions stand twice in `q_raw`, `k_raw`, `q_norm` and
    `k_norm`, one after the other. `model`: an `op.Shape`."""

    def __init__(self, plan: Plan, buffers: Buffers, scalars: Scalars, pipeline: Pipeline, model: Any):
        self.plan, self.buffers, self.scalars, self.pipeline = plan, buffers, scalars, pipeline
        self.group_size, self.eps = model.num_heads // model.num_kv_heads, model.norm_eps
        self.softcap, multiplier = model.attention_softcap, model.attention_multiplier
        self.multiplier = model.head_dim**-0.5 if multiplier is None else multiplier
        self.batch, (*_, self.num_kv_heads, self.head_dim) = buffers.positions.shape[0], buffers.cache_k.shape
        self.parts = self.head_dim // TILE_K
        self.schedule = AttentionSchedule(plan, self.batch, self.num_kv_heads, self.group_size, lax.axis_index("cta"))
        self.groups = self.schedule.groups

    def copy(self, layer, state: ProducerState) -> ProducerState:
        first, number = self.schedule.share(self.plan.context_splits)

        def unit(n, state):
            return self._copy_unit(
                layer, self.schedule.unit(first + n * self.plan.num_ctas, self.plan.context_splits), state
            )

        return lax.fori_loop(0, number, unit, state)

    def _copy_unit(self, layer, unit, state: ProducerState) -> ProducerState:
        row, head, _, split = unit
        start, tiles = self.schedule.tiles(select(self.scalars.positions, row), self.buffers.windows[layer], split)

        def part(n):
            tile, place = div_rem(n, 2 * self.parts)
            kind, at = div_rem(place, self.parts)
            rows = pl.ds((start + tile) * TILE_M, TILE_M)

            def of(cache):
                return lambda: (cache.at[layer, row, rows, head, pl.ds(at * TILE_K, TILE_K)],)

            return [of(self.buffers.cache_k), of(self.buffers.cache_v)], kind

        return self.pipeline.produce(state, tiles * 2 * self.parts, part)

    def attend(self, layer, count, q_smem, p_smem):
        """`q_smem` [H / TILE_K, WGMMA_N, TILE_K] and `p_smem` [TILE_M / TILE_K, WGMMA_N, TILE_K] are operands of the
        tensor cores."""
        buffers, plan = self.buffers, self.plan
        first, number = self.schedule.share(plan.context_splits)

        def unit(n, count):
            row, head, group, split = unit = self.schedule.unit(first + n * plan.num_ctas, plan.context_splits)
            o, m, total, count = self._attend(layer, count, unit, q_smem, p_smem)
            if plan.context_splits == 1:
                self._store(row, head, group, [x / over_rows(total, SHAPE) for x in o])
            else:
                place = split, row, head * self.groups + group
                for part, x in enumerate(o):
                    store(buffers.o_partials.at[*place, part], x)
                store(buffers.max_partials.at[*place], m)
                store(buffers.sum_partials.at[*place], total)
            return count

        return lax.fori_loop(0, number, unit, count)

    def copy_slice(self, layer, unit, state: ProducerState) -> ProducerState:
        """Produce what `attend_slice` consumes."""
        number, needed = unit

        def copy(_, state):
            return self._copy_unit(layer, self.schedule.unit(number, 1), state)

        return lax.fori_loop(0, jnp.where(needed, 1, 0), copy, state)

    def attend_slice(self, layer, count, unit, operand_smem, q_smem, p_smem):
        """The context of one unit of a batch of one, as o_proj's right operand: a K-tile for each part of each query
        head."""
        number, needed = unit

        def attend(_, count):
            o, _, total, count = self._attend(layer, count, self.schedule.unit(number, 1), q_smem, p_smem)
            o = [x / over_rows(total, SHAPE) for x in o]
            plgpu.commit_smem()  # all warps are done with what takes the same place
            for query in range(self._queries):
                for part, x in enumerate(o):
                    context = over_columns(column(x, query), SHAPE) if self._queries > 1 else x
                    store_transposed(operand_smem.at[pl.ds((query * self.parts + part) * WGMMA_N, WGMMA_N)], context)
            plgpu.commit_smem()
            return count

        return lax.fori_loop(0, jnp.where(needed, 1, 0), attend, count)

    def _attend(self, layer, count, unit, q_smem, p_smem):
        """(oᵀ before it is divided by the sum of its weights, by part; their maximum; the sum; the new count)."""
        buffers, (row, head, group, split) = self.buffers, unit
        position, window = buffers.positions[row], buffers.windows[layer]
        start, tiles = self.schedule.tiles(position, window, split)
        values = [load(buffers.v_new.at[layer, row, head, c], ROWS).astype(jnp.float32) for c in self._columns]
        score = self._prepare(layer, row, head, group, split, q_smem)
        # Before the first tile: the new token alone for the first part, nothing for the others.
        has_new = jnp.float32(split == 0)
        o = [over_columns(value, SHAPE) * has_new for value in values]
        m = score * has_new + LOWEST_SCORE * (1 - has_new)
        total = plgpu.layout_cast(jnp.full((WGMMA_N,), 1.0, jnp.float32), COLUMNS) * has_new
        more = over_rows(total, SHAPE) * 0  # weights that are not summed over the rows yet: once, after the loop

        def tile(t, carry):
            *o, m, total, more, count = carry
            chunks = [self.pipeline.take(count + i) for i in range(2 * self.parts)]
            scores = []
            for half in (0, 1):
                s = self._product(
                    (k_smem.at[pl.ds(half * WGMMA_M, WGMMA_M)], q_smem.at[part])
                    for part, k_smem in enumerate(chunks[: self.parts])
                )
                slots = plgpu.broadcasted_iota(jnp.int32, SHAPE, 0, layout=plgpu.Layout.WGMMA)
                slots += (start + t) * TILE_M + half * WGMMA_M
                seen = (slots < position) & (slots > position - window)
                scores.append(jnp.where(seen, self._scores(s), LOWEST_SCORE))
            m_new = jnp.maximum(m, jnp.maximum(*scores).max(axis=0))
            shrink = jnp.exp2(m - m_new)
            weights = [jnp.exp2(s - over_rows(m_new, SHAPE)) for s in scores]
            for half, p in enumerate(weights):
                store_transposed(p_smem.at[half], p)
            plgpu.commit_smem()
            for part, v_smem in enumerate(chunks[self.parts :]):
                added = self._product(
                    (v_smem.at[pl.ds(half * WGMMA_M, WGMMA_M)].transpose((1, 0)), p_smem.at[half]) for half in (0, 1)
                )
                o[part] = o[part] * over_rows(shrink, SHAPE) + added
            for i in range(2 * self.parts):
                self.pipeline.release(count + i)
            more = more * over_rows(shrink, SHAPE) + weights[0] + weights[1]
            return *o, m_new, total * shrink, more, count + 2 * self.parts

        *o, m, total, more, count = lax.fori_loop(0, tiles, tile, (*o, m, total, more, count))
        return o, m, total + more.sum(axis=0), count

    @property
    def _queries(self) -> int:
        """Query heads of a unit, if all units have as many."""
        return min(WGMMA_N, self.group_size)

    def _query_head(self, head, group, query):
        return head * self.group_size + group * WGMMA_N + query

    def combine(self):
        """o = Σ_split 2^(m_split − m) o_split / Σ_split 2^(m_split − m) l_split."""
        buffers, (first, number) = self.buffers, self.schedule.share(1)

        def unit(n, _):
            row, head, group, _ = self.schedule.unit(first + n * self.plan.num_ctas, 1)
            places = [(s, row, head * self.groups + group) for s in range(self.plan.context_splits)]
            maxima, sums = (
                [load(ref.at[*p], COLUMNS) for p in places] for ref in (buffers.max_partials, buffers.sum_partials)
            )
            m = maxima[0]
            for other in maxima[1:]:
                m = jnp.maximum(m, other)
            weights = [jnp.exp2(m_s - m) for m_s in maxima]
            total = over_rows(sum(weight * l_s for weight, l_s in zip(weights, sums, strict=True)), SHAPE)
            o = [
                sum(
                    load(buffers.o_partials.at[*p, part]) * over_rows(weight, SHAPE)
                    for p, weight in zip(places, weights, strict=True)
                )
                for part in range(self.parts)
            ]
            self._store(row, head, group, [x / total for x in o])

        lax.fori_loop(0, number, unit, None)

    @property
    def _columns(self):
        """The head's dimensions in parts."""
        return [pl.ds(part * TILE_K, TILE_K) for part in range(self.parts)]

    def _product(self, pairs):
        """Σ left · rightᵀ, [WGMMA_M, WGMMA_N]."""
        pairs = list(pairs)

        def product(acc):
            for left, right in pairs:
                plgpu.wgmma(acc, left, right.transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC(SHAPE, jnp.float32))

    def _store(self, row, head, group, o):
        """The columns of oᵀ, one for each query head, into the context."""
        buffers = self.buffers
        for query in range(self._queries):
            query_head = self._query_head(head, group, query)

            def store_query(query=query, query_head=query_head):
                for part, x in enumerate(o):
                    target = (query_head * self.parts + part) * self.plan.padded_batch + row
                    store(buffers.context.at[target], column(x, query).astype(buffers.context.dtype))

            if self.group_size % WGMMA_N == 0 or self.groups == 1:
                store_query()
            else:
                pl.when(group * WGMMA_N + query < self.group_size)(store_query)

    def _scores(self, products):
        """Scores to the base 2 of products q · k."""
        if self.softcap is None:
            return products * (self.multiplier * math.log2(math.e))
        return softcapped(products * self.multiplier, self.softcap) * math.log2(math.e)

    def _with_partners(self, read):
        """Pairs, one per part of the head: `read` of its dimensions, and of those that they are rotated with."""
        starts = [part * TILE_K for part in range(self.parts)]
        partners = [(start + self.head_dim // 2) % stored_head_dim(self.head_dim) for start in starts]
        return [tuple(read(pl.ds(at, TILE_K)) for at in pair) for pair in zip(starts, partners, strict=True)]

    def _rope(self, layer, row, parts, norm):
        """Rotate a head, given in parts with their partners, after its norm, if it has one."""
        dtype, angles = self.buffers.q_raw.dtype, row
        if self.buffers.ropes is not None:
            angles += self.buffers.ropes[layer] * self.plan.padded_batch
        if norm is not None:
            mean = sum((own * own).sum(axis=0) for own, _ in parts) / self.head_dim
            inverse = over_rows(lax.rsqrt(mean + self.eps), SHAPE)
            weights = self._with_partners(lambda columns: load(norm.at[layer, columns], ROWS))
            parts = [
                tuple(
                    rounded(rounded(x * inverse, norm.dtype) * over_columns(w.astype(jnp.float32), SHAPE), dtype)
                    for x, w in zip(pair, weight, strict=True)
                )
                for pair, weight in zip(parts, weights, strict=True)
            ]
        rotated = []
        for (own, partner), columns in zip(parts, self._columns, strict=True):
            cos, sin = (
                over_columns(load(x.at[angles, columns], ROWS), SHAPE) for x in (self.buffers.cos, self.buffers.sin)
            )
            rotated.append(rounded(own * cos + partner * sin, dtype))
        return rotated

    def _prepare(self, layer, row, head, group, split, q_smem):
        """Put the queries into `q_smem`; returns their scores with the new key, [WGMMA_N]. The first part's unit of the
        first group also stores the new key."""
        buffers = self.buffers
        first = head * self.group_size + group * WGMMA_N
        q = self._with_partners(
            lambda columns: load_transposed(buffers.q_raw.at[pl.ds(first, WGMMA_N), row, columns]).astype(jnp.float32)
        )
        k = self._with_partners(
            lambda columns: over_columns(load(buffers.k_raw.at[head, row, columns], ROWS).astype(jnp.float32), SHAPE)
        )
        q, k = self._rope(layer, row, q, buffers.q_norm), self._rope(layer, row, k, buffers.k_norm)
        for part, x in enumerate(q):
            store_transposed(q_smem.at[part], x)
        plgpu.commit_smem()

        @pl.when((split == 0) & (group == 0))
        def _():
            for columns, x in zip(self._columns, k, strict=True):
                store(buffers.k_new.at[layer, row, head, columns], column(x, 0).astype(buffers.k_new.dtype))

        return self._scores(sum((x * y).sum(axis=0) for x, y in zip(q, k, strict=True)))
