"""The linears of one group inside the kernel.

    experts    t_part[s] = A[e_u][:, slice s] x[slice s]         this block's share
    gather     h_u = g_u · Σ_s t_part[s]                         its share of pieces; of a single row what it needs, later
    products   y_part[s] = W[:, slice s] x[slice s]              its units
               y_part[S] = Σ_u B[e_u] h_u                        its share of their tiles
    finish     y = r · Σ_s y_part[s] + bias                      its share of its units' pieces, then what follows

From A x to B h blocks exchange. So A comes first, and most of it in blocks that have less of W; h is gathered by blocks that
have nothing else to do, or else late; and B comes in the middle of a block's last products of W. Whoever waits there makes
nobody wait, as the ring goes on filling. A block counts a semaphore up when its products are done, and finishes as soon as
the others of its member have too.

x is the input times its norm's weight, and r = 1 / rms the norm's other factor, one number for each row of the batch: a
linear commutes with it. The tensor cores multiply halves of tiles, [HALF, PIECE], with [PIECE, N]; sums are in fp32. While
copies are under way a block reads other blocks' sums at no more than a cache line in some 14 cycles, so they are shared out
in narrow pieces, [HALF, QUERIES], each in one place, and of a single row only its column is stored. Activations lie in
device memory in pieces, [pieces · N, PIECE]: the N rows' piece 0, then their piece 1 …
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

from pallas_kernels.decode_token.plan import HALF, PIECE, QUERIES, TILE, Group, Plan, input_rows
from pallas_kernels.decode_token.ring import Filled, Ring
from pallas_kernels.decode_token.shares import Shares, divmod_, pick
from pallas_kernels.decode_token.tiles import (
    COLUMNS,
    ROWS,
    column,
    load,
    over_columns,
    over_rows,
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
    """One group. `memory` has the refs `weights`, `biases`, `a`, `b` by name; `y_part` [S + 1, tiles, 2, *part], `t_part`
    [S · parts, targets, 2 · pairs of pieces, *part] and `h` [targets · U · pieces · N + HALF, PIECE] of `plan.exchanged`;
    `gates` [U, N]; `squares` [halves of tiles, N]; `r` [blocks, N]; and the `scalars`. `semaphores` (None where blocks do
    not run at the same time) has one for A, one for h, and one for each member. `steps`: which of STEPS are done.
    `turn(layer)`: how many layers have run in this launch before this one."""

    def __init__(
        self,
        group: Group,
        plan: Plan,
        memory: Any,
        ring: Ring,
        semaphores: Any,
        *,
        steps: Sequence[str] = STEPS,
        turn: Callable[[Any], Any] = lambda layer: layer,
        norm_dim: int | None,
        eps: float,
    ):
        self.group, self.plan, self.memory, self.ring, self.semaphores = group, plan, memory, ring, semaphores
        self.steps, self.turn, self.norm_dim, self.eps = steps, turn, norm_dim, eps
        self.shares = Shares(group, plan, memory.scalars, lax.axis_index("block"))
        self.gather_first = group.gatherers < plan.num_blocks

    def copy(self, layer, filled: Filled) -> Filled:
        """Fill the ring with what `compute` takes from it."""
        memory = self.memory

        def chunks(filled, source, first, number):
            def chunk(c, filled):
                return self.ring.fill(filled, *source(pl.ds((first + c) * PIECE, PIECE)))

            return lax.fori_loop(0, number, chunk, filled)

        def expert(piece):
            number, part = divmod_(piece, self.plan.rank_pieces)
            return pick(memory.scalars.experts, number), pl.ds(part * PIECE, PIECE)

        def of_b(filled, when):
            for _, name, number, at in self.shares.b_shares():

                def of_tile(n, filled, name=name, at=at):
                    rows = pl.ds(at(n) * TILE, TILE)

                    def ranks(piece, filled):
                        number, columns = expert(piece)
                        return self.ring.fill(filled, memory.b[name].at[layer, number, rows, columns])

                    return lax.fori_loop(0, self.shares.used_pieces, ranks, filled)

                filled = lax.fori_loop(0, jnp.where(when, number, 0), of_tile, filled)
            return filled

        for _, name, number, at in self.shares.a_shares() if "experts" in self.steps else ():

            def of_a(n, filled, name=name, at=at):
                pair, part = at(n)
                last = self.shares.used_pieces - 1  # of an odd number, it comes twice
                pieces = 2 * pair, jnp.minimum(2 * pair + 1, last)
                one, other = (memory.a[name].at[layer, *expert(piece)] for piece in pieces)
                first, number = self.shares.chunks_of(part)
                return chunks(filled, lambda columns: (one.at[:, columns], other.at[:, columns]), first, number)

            filled = lax.fori_loop(0, number, of_a, filled)
        for names in self.group.passes if "products" in self.steps else ():
            number, tile = self.shares.units(names)

            def of_unit(n, filled, names=names, number=number, tile=tile):
                rows = pl.ds(tile(n) * TILE, TILE)
                for name, first, last, with_b in self.shares.order(names, n, number):
                    w = memory.weights[name] if name == "lm_head" else memory.weights[name].at[layer]

                    def of_w(columns, w=w):
                        return (w.at[rows, columns],)

                    filled = chunks(filled, of_w, self.shares.first_chunk, first)
                    if with_b is not None:
                        filled = of_b(filled, with_b)
                        filled = chunks(filled, of_w, self.shares.first_chunk + first, last)
                return filled

            filled = lax.fori_loop(0, self.shares.rounds(names, number), of_unit, filled)
        return filled

    def compute(self, layer, count, x, follow: Callable[..., Callable[..., None]], x_smem, h_smem):
        """`x` is the input [pieces · N, PIECE], followed by `HALF` rows that are not used. `follow(names, row, columns)`
        reads what it needs for `HALF` rows and `QUERIES` columns of the linears `names`, and returns the function that
        takes their values and stores what comes of them."""
        if not {"experts", "products"}.isdisjoint(self.steps):
            with jax.named_scope("input"):
                slice_rows = input_rows(self.group.slice_chunks, self.plan.columns)
                self._to_smem(x, self.shares.first_chunk * self.plan.columns, slice_rows, x_smem)
        if "experts" in self.steps:
            with jax.named_scope("experts"):
                count = self._a_products(count, x_smem)
        if "gather" in self.steps and (self.gather_first or "products" not in self.steps):
            with jax.named_scope("gather"):
                self._gather(layer)
        if "products" in self.steps:
            with jax.named_scope("products"):
                count = self._products(layer, count, x_smem, h_smem)
            with jax.named_scope("signal"):
                pl.when(self.shares.member < self.group.members)(lambda: self._signal(2 + self.shares.member))
        if "finish" in self.steps:
            with jax.named_scope("finish"):
                for place, names in enumerate(self.group.passes):
                    number, at = self.shares.finish_share(place, names)

                    def finish(n, _, names=names, at=at):
                        self._finish(layer, n, names, at, follow)

                    lax.fori_loop(0, number, finish, None)
        return count

    def _signal(self, number):
        if self.semaphores is not None:
            plgpu.semaphore_signal(self.semaphores.at[self.group.first_semaphore + number], 1, memory_scope="gpu")

    def _wait(self, number, signals, layer):
        """Until so many have signalled, in this layer and in those that ran before it in this launch."""
        if self.semaphores is not None:
            semaphore = self.semaphores.at[self.group.first_semaphore + number]
            plgpu.semaphore_wait(semaphore, signals * (self.turn(layer) + 1), decrement=False, memory_scope="gpu")

    def _to_smem(self, source, start, rows: int, smem):
        """As the right operand, `rows` rows of activations from `start` on, a multiple of HALF."""
        for some in batched(range(0, rows, HALF), 4):  # as many as the registers have room for
            tiles = [load(source.at[pl.ds(start + row, HALF)], plgpu.Layout.WGMMA_UPCAST_4X) for row in some]
            for row, tile in zip(some, tiles, strict=True):
                smem.at[pl.ds(row, HALF)][...] = tile
        plgpu.commit_smem()

    def _a_products(self, count, x_smem):
        group, mine = self.group, jnp.int32(0)
        for place, _, number, at in self.shares.a_shares():

            def product(n, count, place=place, at=at):
                pair, part = at(n)
                first, chunks = self.shares.chunks_of(part)
                right = self._pieces(x_smem, first - self.shares.first_chunk)
                where = self.shares.slice * group.a_parts + part
                halves, count = self._tile(lambda accs: self._multiply(accs, count, chunks, right, in_halves=True))
                for half, t in enumerate(halves):
                    self._put(self.memory.t_part.at[where, place, 2 * pair + half], t)
                return count

            count, mine = lax.fori_loop(0, number, product, count), mine + number
        if group.adapted:
            pl.when(mine > 0)(lambda: self._signal(0))
        return count

    def _products(self, layer, count, x_smem, h_smem):
        """Those of W, and in the middle of the last ones those of B."""
        for place, names in enumerate(self.group.passes):
            number, tile = self.shares.units(names)
            if place == 0:
                pl.when(number == 0)(self._find_r)

            def unit(n, count, names=names, place=place, number=number, tile=tile):
                if self.shares.has_b(names) and "gather" in self.steps and not self.gather_first:
                    pl.when(n == number // 2)(lambda: self._gather(layer))
                for name, first, last, with_b in self.shares.order(names, n, number):

                    def multiply(accs, count=count, first=first, last=last, with_b=with_b):
                        count = self._multiply(accs, count, first, self._pieces(x_smem))
                        if with_b is not None:
                            count = self._b_products(layer, count, with_b, h_smem)
                            count = self._multiply(accs, count, last, self._pieces(x_smem, first))
                        return count

                    halves, count = self._tile(multiply)
                    put = partial(self._store_part, self.shares.slice, name, tile(n), halves)
                    pl.when(number > 0)(put) if self.shares.has_b(names) else put()
                if place == 0:  # here, where weights are on their way, it makes nobody wait
                    pl.when((n == 0) & (number > 0))(self._find_r)
                return count

            count = lax.fori_loop(0, self.shares.rounds(names, number), unit, count)
        return count

    def _store_part(self, part, name, tile, halves):
        for half, y in enumerate(halves):
            self._put(self.memory.y_part.at[part, self.group.first_tile(name) + tile, half], y)

    def _put(self, ref, tile):
        """A part [HALF, N] of a sum."""
        if self.plan.single:
            store(ref, column(tile, 0))
        else:
            for i in range(self.shares.narrow):
                store(ref.at[i], tile[:, i * QUERIES : (i + 1) * QUERIES])

    def _sum(self, refs, i):
        """Σ of parts, its i-th narrow piece."""
        if self.plan.single:
            return over_columns(sum_of(load(ref, ROWS) for ref in refs), (HALF, QUERIES))
        return sum_of(load(ref.at[i]) for ref in refs)

    def _b_products(self, layer, count, when, h_smem):
        for place, name, number, at in self.shares.b_shares():
            number = jnp.where(when, number, 0)
            pl.when(number > 0)(partial(self._take_h, place, layer, h_smem))

            def product(n, count, name=name, at=at):
                pieces, right = self.shares.used_pieces, self._pieces(h_smem)
                halves, count = self._tile(lambda accs: self._multiply(accs, count, pieces, right))
                self._store_part(self.group.slices, name, at(n), halves)
                return count

            count = lax.fori_loop(0, number, product, count)
        return count

    def _tile(self, multiply: Callable[[Sequence[Any]], Any]):
        """(the halves of a tile, the new count), as `multiply(accs)` adds them to accumulators and returns the count."""

        def halves(*accs):
            count = multiply(accs)
            return [acc[...] for acc in accs], count

        acc = plgpu.ACC((HALF, self.plan.columns), jnp.float32)
        return pl.run_scoped(halves, acc, acc)

    def _pieces(self, smem, first=0):
        """c → piece first + c of a right operand."""
        return lambda c: smem.at[pl.ds((first + c) * self.plan.columns, self.plan.columns)]

    def _multiply(self, accs, count, number, right_smem: Callable[[Any], Any], in_halves: bool = False):
        """accs += Σ_c chunk_c right_c of the next `number` chunks, one of the accs for each half; returns the new count."""

        def chunk(c, count):
            chunk_smem = self.ring.take(count, in_halves)
            for half, acc in enumerate(accs):
                left = chunk_smem.at[pl.ds(half * HALF, HALF)]
                plgpu.wgmma(acc, left, right_smem(c).transpose((1, 0)))
            plgpu.wgmma_wait(len(accs))  # what came before this chunk is done

            @pl.when(c > 0)
            def _():
                self.ring.release(count - 1)

            return count + 1

        after = lax.fori_loop(0, number, chunk, count)
        plgpu.wgmma_wait(0)
        pl.when(number > 0)(lambda: self.ring.release(after - 1))
        return after

    def _finish(self, layer, n, names, at, follow):
        tile, half, i = at(n)
        columns = pl.ds(i * QUERIES, QUERIES)
        group, memory, shape = self.group, self.memory, (HALF, QUERIES)
        out_dim = group.outs[names[0]]
        row = jnp.minimum(tile * TILE + half * HALF, out_dim - HALF)
        put = follow(names, row, columns)
        biases = {
            name: load(memory.biases[name].at[layer, pl.ds(row, HALF)], ROWS) for name in names if name in memory.biases
        }
        r = None if self.norm_dim is None else load(memory.r.at[self.shares.block, columns], COLUMNS)
        pl.when(n == 0)(lambda: self._wait(2 + self.shares.member, group.slices, layer))
        values = []
        for name in names:
            number = group.first_tile(name) + tile
            parts = range(group.slices + (name in group.adapted))
            y = self._sum([memory.y_part.at[s, number, half] for s in parts], i)
            if r is not None:
                y = y * over_rows(r, shape)
            if name in biases:
                y = y + over_columns(biases[name].astype(jnp.float32), shape)
            values.append(y)
        if out_dim % TILE == 0:
            put(*values)
        else:
            pl.when(tile * TILE + half * HALF < out_dim)(partial(put, *values))

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
        parts = [self.memory.t_part.at[s, place, piece] for s in range(self.group.slices * self.group.a_parts)]
        t = sum_of(self._sum(some, i) for some in batched(parts, AT_ONCE))
        expert = divmod_(piece, self.plan.rank_pieces)[0]
        gate = load(self.memory.gates.at[expert, pl.ds(i * QUERIES, QUERIES)], COLUMNS)
        return t * over_rows(gate, t.shape)

    def _take_h(self, place, layer, h_smem):
        """h of a linear as the right operand of B."""
        plan, group = self.plan, self.group
        if plan.single:  # to gather it oneself is less than an exchange more
            self._wait(0, self.shares.a_blocks(), layer)

            def gather(piece, _):
                store_transposed(h_smem.at[pl.ds(piece * QUERIES, QUERIES)], self._h_piece(place, piece, 0))

            lax.fori_loop(0, self.shares.used_pieces, gather, None)
            plgpu.commit_smem()
        else:
            self._wait(1, jnp.minimum(self.shares.h_pieces, group.gatherers), layer)
            start = place * plan.pieces * plan.columns
            self._to_smem(self.memory.h, start, input_rows(plan.pieces, plan.columns), h_smem)
