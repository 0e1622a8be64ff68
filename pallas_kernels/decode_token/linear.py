"""The linears of one group inside the kernel.

    experts    t_part[s] = A[e_u][:, slice s] x[slice s]         this block's share
    gather     h_u = g_u · Σ_s t_part[s]                         its share of pieces; of a single row what it needs, later
    products   y_part[s] = W[:, slice s] x[slice s]              its units
               y_part[S] = Σ_u B[e_u] h_u                        its share of their tiles
    finish     y = r · Σ_s y_part[s] + bias                      its share of its units' pieces, then what follows

From A x to B h blocks exchange. So A comes first, and most of it in blocks that have less of W; h is gathered by blocks
that have nothing else to do, or else late; and B comes last. A block counts a semaphore up when its products are done, and
finishes as soon as the others of its member have too. If a group is `attended`, a slice of its input is the context of a
unit of attention, and all its blocks attend to it: that saves the exchange between attention and o.

All products of a group go through one loop, and so do all copies, though that means to find out each time which it is: the
kernel runs through its instructions once a layer, and once they are more than the 128 KB that a multiprocessor keeps,
each of them comes from the L2 cache every time.

x is the input times its norm's weight, and r = 1 / rms the norm's other factor, one number for each row of the batch: a
linear commutes with it. The tensor cores multiply halves of tiles, [HALF, PIECE], with [PIECE, N]; sums are in fp32. While
copies are under way a block reads other blocks' sums at no more than a cache line in some 14 cycles, so they are shared out
in narrow pieces, [HALF, QUERIES], each in one place, and of a single row the columns of eight parts are one such piece.
Activations lie in device memory in pieces, [pieces · N, PIECE]: the N rows' piece 0, then their piece 1 …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import batched
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.peers import Peers
from pallas_kernels.decode_token.plan import ADDED_UP, HALF, PIECE, QUERIES, TILE, Group, Plan, div, input_rows
from pallas_kernels.decode_token.ring import Filled, Ring
from pallas_kernels.decode_token.shares import Shares, divmod_, ranks_of
from pallas_kernels.decode_token.tiles import (
    COLUMNS,
    ROWS,
    column,
    load,
    over_columns,
    over_rows,
    part_of_single,
    store,
    store_transposed,
    sum_of,
)

AT_ONCE = 32
"""Parts of a sum that the registers have room for."""
STEPS = "experts", "gather", "products", "finish"


def steps_of(group: Group, single: bool) -> tuple[str, ...]:
    """Those that it has something to do in."""
    if not group.adapted:
        return "products", "finish"
    return ("experts", "products", "finish") if single else STEPS


class Linears:
    """One group. `memory` has the refs `weights`, `biases`, `a`, `b` by name; of `plan.exchanged` the parts of sums
    `y_part`, S + 1 of every half of a tile, and `t_part`, `a_sum` of every piece of ranks of every target, and `h`
    [targets · U · pieces · N + HALF, PIECE]; `gates` [U, N]; `squares` [halves of tiles, N]; `r` [blocks, N]; and the
    `scalars`. `semaphores` (None where blocks do not run at the same time) has one for A, one for h, and one for each
    member. `peers`: the devices whose parts of y are added to this one's, in `y_of_all` [ADDED_UP, devices, …], or None.
    `attention`: with what to make the input, if the group is attended. `steps`: which of STEPS are done. `turn(layer)`:
    how many layers have run in this launch before this one."""

    def __init__(
        self,
        group: Group,
        plan: Plan,
        memory: Any,
        ring: Ring,
        semaphores: Any,
        *,
        steps: Sequence[str],
        turn: Callable[[Any], Any] = lambda layer: layer,
        norm_dim: int | None,
        eps: float,
        peers: Peers | None = None,
        attention: Any = None,
    ):
        self.group, self.plan, self.memory, self.ring, self.semaphores = group, plan, memory, ring, semaphores
        self.steps, self.turn, self.norm_dim, self.eps, self.peers = steps, turn, norm_dim, eps, peers
        self.attention = attention
        self.shares = Shares(group, plan, memory.scalars, lax.axis_index("block"))
        self.gather_first = group.gatherers < plan.num_blocks

    def _span(self):
        """(first, last + 1) of the block's products that belong to the steps."""
        shares = self.shares
        begin = 0 if "experts" in self.steps else shares.num_a
        return begin, shares.num_a + (shares.num_w + shares.num_b if "products" in self.steps else 0)

    def copy(self, layer, filled: Filled) -> Filled:
        """Fill the ring with what `compute` takes from it."""
        memory, group = self.memory, self.group
        expert = partial(ranks_of, memory.scalars, self.plan)

        def product(n, filled):
            of = self.shares.product(n)
            rows = pl.ds(of.tile * TILE, TILE)

            def chunk(c):
                columns = pl.ds((of.first + c) * PIECE, PIECE)

                def of_a(name):
                    last = self.shares.used_pieces - 1  # of an odd number, it comes twice
                    pieces = 2 * of.tile, jnp.minimum(2 * of.tile + 1, last)
                    return [memory.a[name].at[layer, *expert(piece), columns] for piece in pieces]

                def of_w(name):
                    w = memory.weights[name]
                    return [w.at[rows, columns] if name == "lm_head" else w.at[layer, rows, columns]]

                def of_b(name):
                    number, ranks = expert(c)
                    return [memory.b[name].at[layer, number, rows, ranks]]

                kinds = (of_a, group.adapted), (of_w, group.outs), (of_b, group.adapted)
                sources = [partial(kind, name) for kind, names in kinds for name in names]
                return sources, of.source

            return self.ring.fill(filled, of.chunks, chunk)

        if self.group.attended and self._multiplies:
            filled = self.attention.copy_own(layer, self._own_unit, filled)
        begin, end = self._span()
        return lax.fori_loop(begin, end, product, filled)

    @property
    def _multiplies(self) -> bool:
        """Whether the steps need the input."""
        return not {"experts", "products"}.isdisjoint(self.steps)

    @property
    def _own_unit(self):
        """(the unit of attention that this block's slice is, whether it needs it)."""
        return self.shares.slice, self.shares.num_a + self.shares.num_w > 0

    def compute(self, layer, count, x, follow: Callable[..., Callable[..., None]], operand_smem, attention_smem=()):
        """`x` is the input [pieces · N, PIECE], followed by `HALF` rows that are not used. `follow(names, row, columns)`
        reads what it needs for `HALF` rows and `QUERIES` columns of the linears `names`, and returns the function that
        takes their values and stores what comes of them. `attention_smem`: operands of attention."""
        if self._multiplies:
            with jax.named_scope("input"):
                if self.group.attended:
                    count = self.attention.attend_own(layer, count, self._own_unit, operand_smem, *attention_smem)
                else:
                    slice_rows = input_rows(self.group.slice_chunks, self.plan.columns)
                    self._to_smem(x, self.shares.first_chunk * self.plan.columns, slice_rows, operand_smem, 0)
            with jax.named_scope("products"):
                count = self._products(layer, count, operand_smem)
        elif "gather" in self.steps:
            self._gather(layer)
        if "products" in self.steps:
            with jax.named_scope("signal"):
                pl.when(self.shares.member < self.group.members)(self._signal_finished)
        if "finish" in self.steps:
            with jax.named_scope("finish"):
                number, at = self.shares.finish_share()
                lax.fori_loop(0, number, lambda n, _: self._finish(layer, n, at, follow), None)
        return count

    def _signal(self, number):
        if self.semaphores is not None:
            plgpu.semaphore_signal(self.semaphores.at[self.group.first_semaphore + number], 1, memory_scope="gpu")

    def _wait(self, number, signals, layer):
        """Until so many have signalled, in this layer and in those that ran before it in this launch."""
        if self.semaphores is not None:
            semaphore = self.semaphores.at[self.group.first_semaphore + number]
            plgpu.semaphore_wait(semaphore, signals * (self.turn(layer) + 1), decrement=False, memory_scope="gpu")

    def _signal_finished(self):
        """The products of this block's units are done."""
        number = 2 + self.shares.member
        if self.peers is None:
            self._signal(number)
        else:
            self.peers.signal(self.semaphores.at[self.group.first_semaphore + number])

    def _wait_for_finished(self, layer):
        """Those of all slices of this block's units are, on all devices."""
        number, slices = 2 + self.shares.member, self.group.slices
        if self.peers is None:
            self._wait(number, slices, layer)
        else:
            signals = self.peers.number * slices * (self.turn(layer) + 1)
            self.peers.wait(self.semaphores.at[self.group.first_semaphore + number], signals)

    def _to_smem(self, source, start, rows: int, operand_smem, place: int):
        """As the right operand, `rows` rows of activations from `start` on, a multiple of HALF, from row `place` on."""
        for some in batched(range(0, rows, HALF), 4):  # as many as the registers have room for
            tiles = [load(source.at[pl.ds(start + row, HALF)], plgpu.Layout.WGMMA_UPCAST_4X) for row in some]
            for row, tile in zip(some, tiles, strict=True):
                operand_smem.at[pl.ds(place + row, HALF)][...] = tile
        plgpu.commit_smem()

    def _products(self, layer, count, operand_smem):
        """Those of A, W and B in one loop, so that there is one piece of code for all. On the way r is found, after the
        first product of W, and h gathered: by idle blocks at once, or by all before their last units; a single row's by
        those who need it, before their last product of W. Weights are under way then, and nobody else waits."""
        group, plan, shares = self.group, self.plan, self.shares
        begin, end = self._span()
        first_w, gather_at = shares.num_a, None
        # Before the last of several products of W, whose chunks come meanwhile; a short phase has but one, and h later.
        own_h_at = first_w + shares.num_w - jnp.where(shares.num_w > 1, 1, 0)
        if "gather" in self.steps:
            units = shares.num_units
            late = first_w + group.width * jnp.maximum(units - 1 - div(units, 4), 0)
            gather_at = first_w if self.gather_first else late

        def product(n, count):
            of = shares.product(n)
            if gather_at is not None:
                pl.when(n == gather_at)(lambda: self._gather(layer))
            wanted = True if gather_at is None else n < end
            row, chunks = (of.first - shares.first_chunk) * plan.columns, of.chunks
            if group.adapted:
                wanted &= of.chunks > 0
                chunks = jnp.where(wanted, chunks, 0)
            if group.adapted and plan.single:
                row = jnp.where(of.of_b, plan.x_rows + of.place * plan.pieces * QUERIES, row)
                pl.when((n == own_h_at) & (shares.num_b > 0))(lambda: self._gather_own_h(layer, operand_smem))
            elif group.adapted:
                row = jnp.where(of.of_b, plan.x_rows, row)
                pl.when(wanted & of.of_b)(lambda: self._take_h(of.place, layer, operand_smem))

            def multiply(*accs):
                after = self._multiply(accs, count, chunks, operand_smem, row, of.of_a)
                return [acc[...] for acc in accs], after

            acc = plgpu.ACC((HALF, plan.columns), jnp.float32)
            halves, count = pl.run_scoped(multiply, acc, acc)
            columns = [self._columns_of(half) for half in halves]

            def put_t():
                for half, values in enumerate(columns):
                    self._put(self.memory.t_part, of.part, (of.place, 2 * of.tile + half), values)

            def put_y():
                tile = shares.tile_number(of.linear, of.tile)
                for half, values in enumerate(columns):
                    self._put_y(of.part, (tile, half), values)

            if group.adapted:
                pl.when(wanted & of.of_a)(put_t)
                pl.when(n == first_w - 1)(lambda: self._signal(0))
                pl.when(wanted & jnp.logical_not(of.of_a))(put_y)
            else:
                put_y()
            pl.when(n == first_w)(self._find_r)
            return count

        # A block that has no products of W goes round once more to gather, without a product that is `wanted`.
        rounds = end if gather_at is None else jnp.maximum(end, gather_at + 1)
        return lax.fori_loop(begin, rounds, product, count)

    def _columns_of(self, tile):
        """What is kept of a part [HALF, N] of a sum: narrow pieces, or of a single row its column."""
        if self.plan.single:
            return [column(tile, 0)]
        return [tile[:, i * QUERIES : (i + 1) * QUERIES] for i in range(self.shares.narrow)]

    def _put(self, parts_gmem, part, where, columns, put=store):
        for i, values in enumerate(columns):
            if self.plan.single:
                put(part_of_single(parts_gmem, part, where), values)
            else:
                put(parts_gmem.at[part, *where, i], values)

    def _put_y(self, part, where, columns):
        if self.peers is None:
            self._put(self.memory.y_part, part, where, columns)
        else:
            self._put(self._y_of(self.peers.own), part, where, columns, self.peers.store)

    def _y_of(self, device):
        """The parts of y that a device has found."""
        (linear,) = self.group.outs
        return self.memory.y_of_all.at[ADDED_UP.index(linear), device]

    def _sum_y(self, where, i, more):
        """Of all parts, of all devices."""
        slices = self.group.slices
        if self.peers is None:
            return self._sum(self.memory.y_part, slices, where, i, more=more)
        return sum_of([self._sum(self._y_of(d), slices, where, i, more=more) for d in range(self.peers.number)])

    def _sum(self, parts_gmem, parts: int, where, i, more: Any = False):
        """Σ of the first `parts` parts, and of the next one if there are `more`, its i-th narrow piece."""
        if not self.plan.single:
            groups = batched(range(parts), AT_ONCE)
            total = sum_of(sum_of(load(parts_gmem.at[part, *where, i]) for part in some) for some in groups)
            return total if more is False else total + jnp.where(more, load(parts_gmem.at[parts, *where, i]), 0)
        total, least, most = 0.0, parts + (more is True), parts + (more is not False)
        for start in range(0, most, QUERIES):
            tile = load(parts_gmem.at[start // QUERIES, *where, 0])
            if start + QUERIES > least:
                numbers = plgpu.broadcasted_iota(jnp.int32, tile.shape, 1, layout=plgpu.Layout.WGMMA) + start
                tile = jnp.where(numbers < parts + jnp.where(more, 1, 0), tile, 0)
            total += tile
        return over_columns(total.sum(axis=1), (HALF, QUERIES))

    def _multiply(self, accs, count, number, operand_smem, row, in_halves):
        """accs += Σ_c chunk_c right_c of the next `number` chunks, one of the accs for each half; returns the new count. The
        right operands are in `operand_smem`, from `row` on."""
        columns = self.plan.columns

        def chunk(c, count):
            chunk_smem = self.ring.take(count, in_halves)
            right = operand_smem.at[pl.ds(row + c * columns, columns)]
            for half, acc in enumerate(accs):
                plgpu.wgmma(acc, chunk_smem.at[pl.ds(half * HALF, HALF)], right.transpose((1, 0)))
            plgpu.wgmma_wait(len(accs))  # what came before this chunk is done

            @pl.when(c > 0)
            def _():
                self.ring.release(count - 1)

            return count + 1

        after = lax.fori_loop(0, number, chunk, count)
        plgpu.wgmma_wait(0)
        pl.when(number > 0)(lambda: self.ring.release(after - 1))
        return after

    def _finish(self, layer, n, at, follow):
        unit, half, start = at(n)
        linear, tile = self.shares.linear_of(unit, 0)
        group, memory, shape = self.group, self.memory, (HALF, QUERIES)
        pieces = [start + i for i in range(self.shares.at_once)]
        columns = [pl.ds(i * QUERIES, QUERIES) for i in pieces]

        def row_of(names):
            return jnp.minimum(tile * TILE + half * HALF, group.outs[names[0]] - HALF)

        def follow_all(names):
            return [follow(names, row_of(names), some) for some in columns]

        first, *others = group.passes
        puts_first = None if others else follow_all(first)  # before the wait, if it is certain
        r = [None if self.norm_dim is None else load(memory.r.at[self.shares.block, some], COLUMNS) for some in columns]
        pl.when(n == 0)(lambda: self._wait_for_finished(layer))
        values: list[list[Any]] = [[] for _ in pieces]  # [piece][place]: all of them are on their way at once
        for found, i, r_i in zip(values, pieces, r, strict=True):
            for place in range(group.width):
                number = self.shares.tile_number(linear + place, tile)
                y = self._sum_y((number, half), i, more=self.shares.is_adapted(linear + place))
                found.append(y if r_i is None else y * over_rows(r_i, shape))

        def finish(names):
            puts, rows = puts_first or follow_all(names), pl.ds(row_of(names), HALF)
            biases = {name: load(b.at[layer, rows], ROWS) for name, b in memory.biases.items() if name in names}
            biases = {name: over_columns(b.astype(jnp.float32), shape) for name, b in biases.items()}
            for put, found in zip(puts, values, strict=True):
                put(*(y + biases[name] if name in biases else y for name, y in zip(names, found, strict=True)))

        for number, names in enumerate(group.passes):
            there = [linear == number * group.width] if others else []
            if group.outs[names[0]] % TILE:
                there.append(tile * TILE + half * HALF < group.outs[names[0]])
            do = partial(finish, names)
            pl.when(there[0] & there[-1])(do) if there else do()

    def _find_r(self):
        """r [N] of the group's input, where it has a norm, into `memory.r`."""
        if self.norm_dim is None:
            return
        total: Any = 0.0
        for start in range(0, self.memory.squares.shape[0], HALF):
            part = load(self.memory.squares.at[pl.ds(start, HALF)])
            numbers = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA) + start
            part = jnp.where(numbers < self.norm_dim // HALF, part, 0).sum(axis=0)
            total += part
        store(self.memory.r.at[self.shares.block], lax.rsqrt(total / self.norm_dim + self.eps))

    def _gather(self, layer):
        """h = g_u · Σ_s t_part[s], rounded, of this block's share of pieces."""
        plan, memory, group = self.plan, self.memory, self.group
        first, number = self.shares.h_share()

        def gather(n, _):
            tile, i = divmod_(first + n * group.gatherers, self.shares.narrow)
            place, piece = divmod_(tile, self.shares.used_pieces)
            rows = pl.ds((place * plan.pieces + piece) * plan.columns + i * QUERIES, QUERIES)
            store_transposed(memory.h.at[rows], self._h_piece(place, piece, i))

        @pl.when(number > 0)
        def _():
            self._wait(0, self.shares.a_blocks(), layer)
            lax.fori_loop(0, number, gather, None)
            self._signal(1)

    def _h_piece(self, place, piece, i):
        """[PIECE, QUERIES] of h, in fp32."""
        t = self._sum(self.memory.t_part, self.group.a_sum, (place, piece), i)
        expert = divmod_(piece, self.plan.rank_pieces)[0]
        gate = load(self.memory.gates.at[expert, pl.ds(i * QUERIES, QUERIES)], COLUMNS)
        return t * over_rows(gate, t.shape)

    def _take_h(self, place, layer, operand_smem):
        """h of a linear as the right operand of B, after x."""
        plan = self.plan
        self._wait(1, jnp.minimum(self.shares.h_pieces, self.group.gatherers), layer)
        start = place * plan.pieces * plan.columns
        self._to_smem(self.memory.h, start, input_rows(plan.pieces, plan.columns), operand_smem, plan.x_rows)

    def _gather_own_h(self, layer, operand_smem):
        """h of a single row, of each linear of whose B this block has tiles, after x: to gather it oneself is less than an
        exchange more."""
        self._wait(0, self.shares.a_blocks(), layer)

        def of_tile(n, _):
            _, _, place, number = self.shares.b_tile(n)

            def gather(pair, _):
                pieces = [jnp.minimum(2 * pair + i, number - 1) for i in (0, 1)]
                found = [self._h_piece(place, piece, 0) for piece in pieces]  # both are on their way at once
                for piece, h in zip(pieces, found, strict=True):
                    row = self.plan.x_rows + (place * self.plan.pieces + piece) * QUERIES
                    store_transposed(operand_smem.at[pl.ds(row, QUERIES)], h)

            lax.fori_loop(0, div(number + 1, 2), gather, None)

        lax.fori_loop(0, self.shares.num_b, of_tile, None)
        plgpu.commit_smem()
