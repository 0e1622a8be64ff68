"""The products of one group of linears: this CTA's tiles of A, W and B through one loop.

    shrink      t_partials[s] = A[e_u][:, slice s] x[slice s]       this CTA's tiles of A
    reduce_h    h_u = g_u · Σ_s t_partials[s]                       `experts`
    gemm        y_partials[s] = W[:, slice s] x[slice s]            its units
                y_partials[split_k] = Σ_u B[e_u] h_u                its share of their tiles
                W is codes and scales if it is quantised            `dequantise`
    epilogue    y = r · Σ_s y_partials[s] + bias, …                 `epilogue`

Between A x and B h the CTAs exchange partial sums. So A comes first, and most of it in CTAs that have less of W; h is
reduced by CTAs that have nothing else to do, or else late; and B comes last.

All tiles of a group go through one loop, and so do all copies, though each time it must be found out what the tile is:
the kernel runs through its instructions once a layer, and once they are more than the 128 KB that a multiprocessor
caches, each of them comes from the L2 cache every time.

x is the input times its norm's weight, and r = 1 / rms the norm's other factor, one number for each row of the batch: a
linear commutes with it. The tensor cores multiply halves of chunks, [WGMMA_M, TILE_K], with [TILE_K, N]; sums are in
fp32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import batched
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.all_reduce import AllReduce
from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.dequantise import QuantisedProduct
from pallas_kernels.megakernel.epilogue import Epilogue, Store
from pallas_kernels.megakernel.experts import ExpertHidden
from pallas_kernels.megakernel.partial_sums import PartialSums
from pallas_kernels.megakernel.pipeline import CodesAndScales, Pipeline, ProducerState
from pallas_kernels.megakernel.plan import Group, Plan
from pallas_kernels.megakernel.register_tiles import inverse_rms, load, store
from pallas_kernels.megakernel.schedule import Scalars, TileSchedule, div, expert_ranks, where
from pallas_kernels.megakernel.semaphores import GroupSemaphores
from pallas_kernels.megakernel.sizes import CODE_BYTES, TILE_K, TILE_M, WGMMA_M, WGMMA_N, chunk_groups, smem_rows

STEPS = "shrink", "reduce_h", "gemm", "epilogue"


def steps_of(group: Group, is_batch_one: bool) -> tuple[str, ...]:
    """Steps in which a group has work: without experts only the GEMM and its epilogue."""
    if not group.adapted:
        return "gemm", "epilogue"
    return ("shrink", "gemm", "epilogue") if is_batch_one else STEPS


class Gemm:
    """One group inside the kernel: `copy` is its producer warpgroup's part, `compute` its consumer's.

    `steps`: which of `STEPS` this launch does. `store`: what becomes of the outputs. `norm_dim`: D of the input's norm,
    or None. `attention`: computes the input, if the group has fused attention."""

    def __init__(
        self,
        group: Group,
        plan: Plan,
        buffers: Buffers,
        scalars: Scalars,
        pipeline: Pipeline,
        semaphores: Any,
        *,
        steps: Sequence[str],
        store: Store,
        norm_dim: int | None,
        eps: float,
        all_reduce: AllReduce | None = None,
        attention: Any = None,
    ):
        self.group, self.plan, self.buffers, self.scalars, self.pipeline = group, plan, buffers, scalars, pipeline
        self.steps, self.norm_dim, self.eps, self.attention = steps, norm_dim, eps, attention
        self.schedule = schedule = TileSchedule(group, plan, scalars, lax.axis_index("cta"))
        # In a batch every partial sum is a tile of its own, and polling them takes longer: 7.66 ms instead of 7.00 with
        # 32 rows and all 7 linears (7B, H200), perhaps because the instructions are more than a multiprocessor caches.
        polls = semaphores is not None and plan.is_batch_one
        self.partial_sums = PartialSums(group, plan, buffers, all_reduce, polls=polls)
        self.semaphores = GroupSemaphores(semaphores, group, schedule, all_reduce)
        self.quantised_product = None
        if group.layout is not None:
            self.quantised_product = QuantisedProduct(
                group.layout, pipeline, plan.padded_batch, compiled=semaphores is not None
            )
        self.hidden = ExpertHidden(group, plan, buffers, schedule, self.partial_sums, self.semaphores, self._to_smem)
        self.epilogue = Epilogue(
            group, buffers, schedule, self.partial_sums, self.semaphores, store, has_norm=norm_dim is not None
        )

    def _range(self):
        """(first, last + 1) of the CTA's tiles that belong to the steps."""
        schedule = self.schedule
        begin = 0 if "shrink" in self.steps else schedule.num_a
        return begin, schedule.num_a + (schedule.num_w + schedule.num_b if "gemm" in self.steps else 0)

    @property
    def _multiplies(self) -> bool:
        """True if the steps multiply with the input."""
        return not {"shrink", "gemm"}.isdisjoint(self.steps)

    @property
    def _attention_unit(self):
        """(the unit of attention that this CTA's slice is, whether the CTA needs it)."""
        return self.schedule.slice, self.schedule.num_a + self.schedule.num_w > 0

    def copy(self, layer, state: ProducerState) -> ProducerState:
        """Produce the chunks that `compute` consumes."""
        buffers, group = self.buffers, self.group
        expert = partial(expert_ranks, self.scalars, self.plan)

        def copy_tile(n, state):
            tile = self.schedule.tile(n)
            rows = pl.ds(tile.tile * TILE_M, TILE_M)

            def chunk(c):
                columns = pl.ds((tile.first + c) * TILE_K, TILE_K)

                def of_a(name):
                    last = self.schedule.used_rank_tiles - 1  # of an odd number, it comes twice
                    pair = 2 * tile.tile, jnp.minimum(2 * tile.tile + 1, last)
                    return [buffers.a[name].at[layer, *expert(rank_tile), columns] for rank_tile in pair]

                def of_w(name):
                    w, layout = buffers.weights[name], group.layout
                    if layout is None:
                        return [w.at[rows, columns] if name == "lm_head" else w.at[layer, rows, columns]]
                    size, groups = CODE_BYTES[layout.bits], chunk_groups(layout)
                    first_group = 0 if layout.group_size is None else (tile.first + c) * groups
                    return CodesAndScales(
                        w.at[layer, rows, pl.ds((tile.first + c) * size, size)],
                        buffers.scales[name].at[layer, pl.ds(first_group, groups), rows],
                    )

                def of_b(name):
                    number, ranks = expert(c)
                    return [buffers.b[name].at[layer, number, rows, ranks]]

                kinds = (of_a, group.adapted), (of_w, group.outs), (of_b, group.adapted)
                sources = [partial(kind, name) for kind, names in kinds for name in names]
                return sources, tile.source

            return self.pipeline.produce(state, tile.chunks, chunk)

        if group.fused_attention and self._multiplies:
            state = self.attention.copy_slice(layer, self._attention_unit, state)
        begin, end = self._range()
        return lax.fori_loop(begin, end, copy_tile, state)

    def compute(self, layer, count, x, operand_smem, attention_smem=()):
        """Consume from chunk `count` on; returns the new count. `x` is the input in K-tiles, `attention_smem` the
        operands of attention."""
        if self._multiplies:
            with jax.named_scope("input"):
                if self.group.fused_attention:
                    count = self.attention.attend_slice(
                        layer, count, self._attention_unit, operand_smem, *attention_smem
                    )
                else:
                    rows = smem_rows(self.group.max_slice_k_tiles, self.plan.padded_batch)
                    self._to_smem(x, self.schedule.first_k_tile * self.plan.padded_batch, rows, operand_smem, 0)
            if self.group is not self.plan.head:
                self.partial_sums.forget_t()
            with jax.named_scope("products"):
                count = self._multiply_tiles(layer, count, operand_smem)
        elif "reduce_h" in self.steps:
            self.hidden.reduce(layer)
        if "gemm" in self.steps and not self.partial_sums.polls_y:
            with jax.named_scope("signal"):
                pl.when(self.schedule.cta_group < self.group.cta_groups)(self.semaphores.signal_units)
        if "epilogue" in self.steps:
            with jax.named_scope("epilogue"):
                self.epilogue.run(layer)
        return count

    def _to_smem(self, source, start, rows: int, operand_smem, place: int):
        """Copy `rows` rows of an activation from `start` on, a multiple of WGMMA_M, to row `place` of the right
        operand."""
        for some in batched(range(0, rows, WGMMA_M), 4):  # as many as the registers have room for
            tiles = [load(source.at[pl.ds(start + row, WGMMA_M)], plgpu.Layout.WGMMA_UPCAST_4X) for row in some]
            for row, tile in zip(some, tiles, strict=True):
                operand_smem.at[pl.ds(place + row, WGMMA_M)][...] = tile
        plgpu.commit_smem()

    def _multiply_tiles(self, layer, count, operand_smem):
        """All tiles of the steps. On the way r is computed, after the first tile of W, and h reduced: by idle CTAs at
        once, or by all before their last units; of a batch of one by those who need it, before their last tile of W.
        Weights are in flight then, and nobody else waits."""
        group, plan, schedule = self.group, self.plan, self.schedule
        begin, end = self._range()
        first_w, reduce_at = schedule.num_a, None
        # Before the last of several tiles of W, whose chunks come meanwhile; a short phase has but one, and h later.
        own_h_at = first_w + schedule.num_w - jnp.where(schedule.num_w > 1, 1, 0)
        if "reduce_h" in self.steps:
            units = schedule.num_units
            late = first_w + group.width * jnp.maximum(units - 1 - div(units, 4), 0)
            reduce_at = first_w if group.reducer_ctas < plan.num_ctas else late

        def multiply_tile(n, count):
            tile = schedule.tile(n)
            if reduce_at is not None:
                pl.when(n == reduce_at)(lambda: self.hidden.reduce(layer))
            if self.quantised_product is not None:  # A has been multiplied
                rows = smem_rows(group.max_slice_k_tiles, plan.padded_batch)
                pl.when(n == first_w)(partial(self.quantised_product.move_columns, operand_smem, rows))
            wanted = True if reduce_at is None else n < end
            row = (tile.first - schedule.first_k_tile) * plan.padded_batch  # of A, and 0 of W; codes do not use it
            chunks, codes = tile.chunks, 0
            if group.adapted:
                wanted &= tile.chunks > 0
                chunks = jnp.where(wanted, chunks, 0)
            if self.quantised_product is not None:
                is_w = jnp.logical_not(tile.is_a | tile.is_b) if group.adapted else True
                chunks, codes = where(is_w, 0, chunks), where(is_w, chunks, 0)
            if group.adapted and plan.is_batch_one:
                row = jnp.where(tile.is_b, plan.x_smem_rows + tile.adapted_index * plan.max_rank_tiles * WGMMA_N, row)
                pl.when((n == own_h_at) & (schedule.num_b > 0))(lambda: self.hidden.reduce_own(operand_smem))
            elif group.adapted:
                row = jnp.where(tile.is_b, plan.x_smem_rows, row)
                if not schedule.h_comes_in_pieces:
                    pl.when(wanted & tile.is_b)(lambda: self.hidden.load(tile.adapted_index, layer, operand_smem))

            def multiply(*accs):
                def multiply_piece(piece, count):
                    first, number = schedule.h_piece(tile.is_b, chunks, piece)
                    load_h = partial(self.hidden.load, tile.adapted_index, layer, operand_smem, first)
                    pl.when(tile.is_b)(load_h)
                    return self._accumulate(accs, count, number, operand_smem, row, tile.is_a)

                if schedule.h_comes_in_pieces:
                    after = lax.fori_loop(0, schedule.num_h_pieces(tile.is_b, chunks), multiply_piece, count)
                else:
                    after = self._accumulate(accs, count, chunks, operand_smem, row, tile.is_a)
                if self.quantised_product is not None:
                    return self.quantised_product.finish(accs, after, codes, operand_smem)
                return [acc[...] for acc in accs], after

            acc = plgpu.ACC((WGMMA_M, plan.padded_batch), jnp.float32)
            halves, count = pl.run_scoped(multiply, acc, acc)
            columns = [self.partial_sums.columns_of(half) for half in halves]

            def store_t():
                for half, values in enumerate(columns):
                    self.partial_sums.store_t(tile.partial, (tile.adapted_index, 2 * tile.tile + half), values)

            def store_y():
                number = schedule.tile_number(tile.linear, tile.tile)
                for half, values in enumerate(columns):
                    self.partial_sums.store_y(tile.partial, (number, half), values)

            if group.adapted:
                pl.when(wanted & tile.is_a)(store_t)
                if not self.partial_sums.polls:
                    pl.when(n == first_w - 1)(self.semaphores.signal_a_x)
                pl.when(wanted & jnp.logical_not(tile.is_a))(store_y)
            else:
                store_y()
            pl.when(n == first_w)(self._compute_inverse_rms)
            return count

        # A CTA that has no tiles of W goes round once more to reduce h, without a tile that is `wanted`.
        rounds = end if reduce_at is None else jnp.maximum(end, reduce_at + 1)
        return lax.fori_loop(begin, rounds, multiply_tile, count)

    def _accumulate(self, accs, count, number, operand_smem, row, in_halves):
        """accs += Σ_c chunk_c right_c of the next `number` chunks, one of the accs for each half; returns the new
        count. The right operands are in `operand_smem`, from `row` on."""
        padded_batch = self.plan.padded_batch

        def accumulate_chunk(c, count):
            chunk_smem = self.pipeline.take(count, in_halves)
            right = operand_smem.at[pl.ds(row + c * padded_batch, padded_batch)]
            for half, acc in enumerate(accs):
                plgpu.wgmma(acc, chunk_smem.at[pl.ds(half * WGMMA_M, WGMMA_M)], right.transpose((1, 0)))
            plgpu.wgmma_wait(len(accs))  # what came before this chunk is done

            @pl.when(c > 0)
            def _():
                self.pipeline.release(count - 1)

            return count + 1

        if isinstance(number, int) and number == 0:  # all chunks are codes
            return count
        after = lax.fori_loop(0, number, accumulate_chunk, count)
        plgpu.wgmma_wait(0)
        pl.when(number > 0)(lambda: self.pipeline.release(after - 1))
        return after

    def _compute_inverse_rms(self):
        """r [N] of the group's input, where it has a norm."""
        if self.norm_dim is None:
            return
        r = inverse_rms(self.buffers.square_sums, self.norm_dim, self.eps)
        store(self.buffers.inverse_rms.at[self.schedule.cta], r)
