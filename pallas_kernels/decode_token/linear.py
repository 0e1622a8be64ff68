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
in narrow pieces, [HALF, QUERIES], each in one place, and of a single row only its column is stored.
Activations lie in device memory in pieces, [pieces · N, PIECE]: the N rows' piece 0, then their piece 1 …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import batched
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.plan import HALF, PIECE, QUERIES, TILE, Group, Plan, input_rows
from pallas_kernels.decode_token.ring import Filled, Ring

COMPILER = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
"""Every layout is given, because inferring them takes most of the time to compile."""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a vector [N], equal in all rows of a tile
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector [HALF], equal in all columns
AT_ONCE = 32  # parts of a sum that the registers have room for


def over_rows(vector, shape):
    """[N] → [HALF, N]."""
    return lax.broadcast_in_dim(vector, shape, [1])


def over_columns(vector, shape):
    """[HALF] → [HALF, N]."""
    return lax.broadcast_in_dim(vector, shape, [0])


def load(ref, layout=plgpu.Layout.WGMMA):
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref, value):
    """To device memory: from JAX 0.12 on, a plain assignment would refuse what does not fill cache lines."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def store_transposed(ref, tile):
    """ref [N, HALF] = tileᵀ."""
    store(ref.transpose((1, 0)), plgpu.layout_cast(tile.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED))


def load_transposed(ref):
    """[HALF, N] of ref [N, HALF]."""
    tile = load(ref.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def column(tile, number: int):
    """[HALF] of [HALF, columns]."""
    numbers = plgpu.broadcasted_iota(jnp.int32, tile.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(numbers == number, tile, 0).sum(axis=1)


def part_shape(single: bool, columns: int) -> tuple[int, ...]:
    """Of half a tile of a sum in device memory: narrow pieces, or of a single row its column."""
    return (HALF,) if single else (columns // QUERIES, HALF, QUERIES)


def share(base, count, index, step):
    """Which of `count` things, the first of which has number `base`, have a number that is `index` modulo `step`:
    (the first of them, how many)."""
    first = (index + step - base % step) % step
    return first, jnp.maximum(0, (count - first + step - 1) // step)


class Scalars(NamedTuple):
    """What decides where weights are read, in registers from the launch's start: each of them is a way to the L2 cache and
    back, which the copies of a phase would wait for."""

    experts: list[Any]
    """[U]: those in use, first."""
    num_used: Any
    positions: list[Any]
    """[N]: where the rows' tokens are; none where that does not matter."""

    @classmethod
    def of(cls, memory: Any) -> Scalars:
        def all_of(name):
            ref = getattr(memory, name, None)
            return [] if ref is None else [ref[i] for i in range(ref.shape[0])]

        return cls(all_of("experts"), (all_of("num_used") or [0])[0], all_of("positions"))


def pick(values: Sequence[Any], index):
    """values[index]."""
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        chosen = jnp.where(index == i, value, chosen)
    return chosen


STEPS = "experts", "gather", "products", "finish"


def steps_of(group: Group, single: bool) -> tuple[str, ...]:
    """Those that it has something to do in."""
    return tuple(step for step in STEPS if group.adapted or step not in STEPS[:2] if not (single and step == "gather"))


class Linears:
    """One group. `memory` has the refs `weights`, `biases`, `a`, `b` by name, `y_part` [S + 1, tiles, 2, *part] and `t_part`
    [S · parts, targets, 2 · pairs of pieces, *part], with part as `part_shape` says; `h` [targets · U · pieces · N + HALF,
    PIECE]; `gates` [U, N]; `squares` [halves of tiles, N]; `r` [blocks, N]; and the `scalars`. `semaphores` (None where
    blocks do not run at the same time) has one for A, one for h, and one for each member. `steps`: which of STEPS are done.
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
        self.block = lax.axis_index("block")
        self.slice, self.member = self.block % group.slices, self.block // group.slices
        self.first_chunk = self.slice * group.chunks // group.slices
        self.num_chunks = (self.slice + 1) * group.chunks // group.slices - self.first_chunk
        self.gather_first = group.gatherers < plan.num_blocks

    @property
    def _used_pieces(self):
        return self.memory.scalars.num_used * self.plan.rank_pieces

    def _a_shares(self):
        """By adapted linear: (its place, its name, how many products are this block's, the n-th one's pair of pieces and
        part). Light members take their quota first, and the others the rest, from the last one on."""
        group = self.group
        heavy, quota = group.members - group.light, group.light * group.quota
        is_light, each = self.member >= heavy, self._a_products_each
        step = jnp.where(is_light, max(1, group.light), heavy)

        def part_of(begin, end, low, high, index, step):
            """(first, how many) of those from begin on that are also from low on; dealt from there."""
            begin, end = jnp.maximum(low, begin), jnp.minimum(high, end)
            first, number = share(begin - low, end - begin, index, step)
            return begin + first, number

        for place, name in enumerate(group.adapted):
            begin, end = place * each, (place + 1) * each
            of_light = part_of(begin, end, 0, quota, self.member - heavy, max(1, group.light))
            of_heavy = part_of(begin, end, quota, len(group.adapted) * each, heavy - 1 - self.member, heavy)
            first, number = (jnp.where(is_light, *pair) for pair in zip(of_light, of_heavy, strict=True))
            number = jnp.where(self.member < group.members, number, 0)

            def at(n, first=first - begin):
                return divmod_(first + n * step, group.a_parts)

            yield place, name, number, at

    @property
    def _a_products_each(self):
        """Products of A for one slice of one linear."""
        return (self._used_pieces + 1) // 2 * self.group.a_parts

    def _a_blocks(self):
        """How many blocks have products of A."""
        group, number = self.group, len(self.group.adapted) * self._a_products_each
        light = jnp.minimum(number, group.light if group.quota else 0)
        others = jnp.clip(number - group.light * group.quota, 0, group.members - group.light)
        return group.slices * (light + others)

    def _part(self, part):
        """(first chunk, how many) of a part of this block's slice."""
        low, high = (self.num_chunks * i // self.group.a_parts for i in (part, part + 1))
        return self.first_chunk + low, high - low

    def _units(self, names):
        """(how many units of a pass are this block's, the n-th one's tile)."""
        group = self.group
        first, number = share(group.first_unit(names), group.units(names), self.member, group.members)
        number = jnp.where(self.member < group.members, number, 0)

        def tile(n):
            return first + n * group.members

        return number, tile

    @property
    def _narrow(self):
        """Pieces of `QUERIES` columns that a tile's columns are."""
        return self.plan.columns // QUERIES

    def _finish_share(self, place, names):
        """(how many narrow pieces of a pass's tiles this block finishes, the n-th one's tile, half, and place there): the
        blocks of a member share those of its units."""
        units, tile = self._units(names)
        each = 2 * self._narrow
        first, number = share(place * units * each, units * each, self.slice, self.group.slices)

        def at(n):
            unit, piece = divmod_(first + n * self.group.slices, each)
            half, i = divmod_(piece, self._narrow)
            return tile(unit), half, i

        return number, at

    @property
    def _h_pieces(self):
        """Of all adapted linears, [PIECE, QUERIES]."""
        return len(self.group.adapted) * self._used_pieces * self._narrow

    def _h_share(self):
        """(the first piece of h that this block gathers, how many)."""
        group, from_last = self.group, self.plan.num_blocks - 1 - self.block
        first, number = share(0, self._h_pieces, from_last, group.gatherers)
        return first, jnp.where(from_last < group.gatherers, number, 0)

    def _b_shares(self):
        """By adapted linear: (its place, its name, how many of its tiles are this block's, the n-th one): the blocks of a
        member share those of its units."""
        for names in self.group.passes:
            units, tile = self._units(names)
            for name in names:
                if name in self.group.adapted:
                    place = self.group.adapted.index(name)
                    first, number = share(place * units, units, self.slice, self.group.slices)

                    def at(n, first=first, tile=tile):
                        return tile(first + n * self.group.slices)

                    yield place, name, number, at

    def _order(self, names, n, number):
        """Of the n-th of a block's `number` units of a pass: (of each name, how many chunks of W come first and how many
        last; whether B comes between those). Without a unit of the last pass there is B alone."""
        last = self._has_b(names)
        chunks = jnp.where(number > 0, self.num_chunks, 0) if last else self.num_chunks
        split = chunks // 2 if last else chunks
        yield from ((name, chunks, 0, False) for name in names[:-1])
        yield names[-1], split, chunks - split, last and n + 1 >= number

    def _rounds(self, names, number):
        """How many units `_order` tells of."""
        return jnp.maximum(number, 1) if self._has_b(names) else number

    def _has_b(self, names):
        return bool(self.group.adapted) and names == self.group.passes[-1]

    def copy(self, layer, filled: Filled) -> Filled:
        """Fill the ring with what `compute` takes from it."""
        memory = self.memory

        def chunks(filled, source, first, number):
            def chunk(c, filled):
                return self.ring.fill(filled, *source(pl.ds((first + c) * PIECE, PIECE)))

            return lax.fori_loop(0, number, chunk, filled)

        def expert(name, piece):
            number, part = divmod_(jnp.minimum(piece, self._used_pieces - 1), self.plan.rank_pieces)
            return pick(memory.scalars.experts, number), pl.ds(part * PIECE, PIECE)

        def of_b(filled, when):
            for _, name, number, at in self._b_shares():

                def of_tile(n, filled, name=name, at=at):
                    rows = pl.ds(at(n) * TILE, TILE)

                    def ranks(piece, filled):
                        number, columns = expert(name, piece)
                        return self.ring.fill(filled, memory.b[name].at[layer, number, rows, columns])

                    return lax.fori_loop(0, self._used_pieces, ranks, filled)

                filled = lax.fori_loop(0, jnp.where(when, number, 0), of_tile, filled)
            return filled

        for _, name, number, at in self._a_shares() if "experts" in self.steps else ():

            def of_a(n, filled, name=name, at=at):
                pair, part = at(n)
                one, other = (memory.a[name].at[layer, *expert(name, 2 * pair + half)] for half in (0, 1))
                return chunks(filled, lambda columns: (one.at[:, columns], other.at[:, columns]), *self._part(part))

            filled = lax.fori_loop(0, number, of_a, filled)
        for names in self.group.passes if "products" in self.steps else ():
            number, tile = self._units(names)

            def of_unit(n, filled, names=names, number=number, tile=tile):
                rows = pl.ds(tile(n) * TILE, TILE)
                for name, first, last, with_b in self._order(names, n, number):
                    w = memory.weights[name] if name == "lm_head" else memory.weights[name].at[layer]

                    def of_w(columns, w=w):
                        return (w.at[rows, columns],)

                    filled = chunks(filled, of_w, self.first_chunk, first)
                    if with_b is not False:
                        filled = of_b(filled, with_b)
                        filled = chunks(filled, of_w, self.first_chunk + first, last)
                return filled

            filled = lax.fori_loop(0, self._rounds(names, number), of_unit, filled)
        return filled

    def compute(self, layer, count, x, follow: Callable[..., Callable[..., None]], x_smem, h_smem):
        """`x` is the input [pieces · N, PIECE], followed by `HALF` rows that are not used. `follow(names, row, columns)`
        reads what it needs for `HALF` rows and `QUERIES` columns of the linears `names`, and returns the function that
        takes their values and stores what comes of them."""
        if not {"experts", "products"}.isdisjoint(self.steps):
            with jax.named_scope("input"):
                slice_rows = input_rows(self.group.slice_chunks, self.plan.columns)
                self._to_smem(x, self.first_chunk * self.plan.columns, slice_rows, x_smem)
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
                pl.when(self.member < self.group.members)(lambda: self._signal(2 + self.member))
        if "finish" in self.steps:
            with jax.named_scope("finish"):
                for place, names in enumerate(self.group.passes):
                    number, at = self._finish_share(place, names)

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
        for place, _, number, at in self._a_shares():

            def product(n, count, place=place, at=at):
                pair, part = at(n)
                first, chunks = self._part(part)

                def multiply(*accs):
                    right = self._pieces(x_smem, first - self.first_chunk)
                    after = self._multiply(accs, count, chunks, right, in_halves=True)
                    return *(acc[...] for acc in accs), after

                *halves, count = pl.run_scoped(multiply, self._accumulator, self._accumulator)
                for half, t in enumerate(halves):
                    self._put(self.memory.t_part.at[self.slice * group.a_parts + part, place, 2 * pair + half], t)
                return count

            count, mine = lax.fori_loop(0, number, product, count), mine + number
        if group.adapted:
            pl.when(mine > 0)(lambda: self._signal(0))
        return count

    def _products(self, layer, count, x_smem, h_smem):
        """Those of W, and in the middle of the last ones those of B."""
        for place, names in enumerate(self.group.passes):
            number, tile = self._units(names)
            if place == 0:
                pl.when(number == 0)(self._find_r)

            def unit(n, count, names=names, place=place, number=number, tile=tile):
                if self._has_b(names) and "gather" in self.steps and not self.gather_first:
                    pl.when(n == number // 2)(lambda: self._gather(layer))
                for name, first, last, with_b in self._order(names, n, number):

                    def multiply(*accs, count=count, first=first, last=last, with_b=with_b):
                        count = self._multiply(accs, count, first, self._pieces(x_smem))
                        if with_b is not False:
                            count = self._b_products(layer, count, with_b, h_smem)
                            count = self._multiply(accs, count, last, self._pieces(x_smem, first))
                        return *(acc[...] for acc in accs), count

                    *halves, count = pl.run_scoped(multiply, self._accumulator, self._accumulator)
                    put = partial(self._store_part, self.slice, name, tile(n), halves)
                    pl.when(number > 0)(put) if self._has_b(names) else put()
                if place == 0:  # here, where weights are on their way, it makes nobody wait
                    pl.when((n == 0) & (number > 0))(self._find_r)
                return count

            count = lax.fori_loop(0, self._rounds(names, number), unit, count)
        return count

    def _store_part(self, part, name, tile, halves):
        for half, y in enumerate(halves):
            self._put(self.memory.y_part.at[part, self.group.first_tile(name) + tile, half], y)

    def _put(self, ref, tile):
        """A part [HALF, N] of a sum."""
        if self.plan.single:
            store(ref, column(tile, 0))
        else:
            for i in range(self._narrow):
                store(ref.at[i], tile[:, i * QUERIES : (i + 1) * QUERIES])

    def _sum(self, refs, i):
        """Σ of parts, its i-th narrow piece."""
        if self.plan.single:
            return over_columns(sum_of(load(ref, ROWS) for ref in refs), (HALF, QUERIES))
        return sum_of(load(ref.at[i]) for ref in refs)

    def _b_products(self, layer, count, when, h_smem):
        for place, name, number, at in self._b_shares():
            number = jnp.where(when, number, 0)
            pl.when(number > 0)(partial(self._take_h, place, layer, h_smem))

            def product(n, count, name=name, at=at):
                def multiply(*accs):
                    after = self._multiply(accs, count, self._used_pieces, self._pieces(h_smem))
                    return *(acc[...] for acc in accs), after

                *halves, count = pl.run_scoped(multiply, self._accumulator, self._accumulator)
                self._store_part(self.group.slices, name, at(n), halves)
                return count

            count = lax.fori_loop(0, number, product, count)
        return count

    @property
    def _accumulator(self):
        return plgpu.ACC((HALF, self.plan.columns), jnp.float32)

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
        r = None if self.norm_dim is None else load(memory.r.at[self.block, columns], COLUMNS)
        pl.when(n == 0)(lambda: self._wait(2 + self.member, group.slices, layer))
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
        store(self.memory.r.at[self.block], lax.rsqrt(total / self.norm_dim + self.eps))

    def _gather(self, layer):
        """h = g_u · Σ_s t_part[s], rounded, of this block's share of pieces."""
        plan, memory, group = self.plan, self.memory, self.group
        first, number = self._h_share()

        def gather(n, _):
            tile, i = divmod_(first + n * group.gatherers, self._narrow)
            place, piece = divmod_(tile, self._used_pieces)
            rows = pl.ds((place * plan.pieces + piece) * plan.columns + i * QUERIES, QUERIES)
            store_transposed(memory.h.at[rows], self._h_piece(place, piece, i))

        @pl.when(number > 0)
        def _():
            self._wait(0, self._a_blocks(), layer)
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
            self._wait(0, self._a_blocks(), layer)

            def gather(piece, _):
                store_transposed(h_smem.at[pl.ds(piece * QUERIES, QUERIES)], self._h_piece(place, piece, 0))

            lax.fori_loop(0, self._used_pieces, gather, None)
            plgpu.commit_smem()
        else:
            self._wait(1, jnp.minimum(self._h_pieces, group.gatherers), layer)
            start = place * plan.pieces * plan.columns
            self._to_smem(self.memory.h, start, input_rows(plan.pieces, plan.columns), h_smem)


def sum_of(parts):
    first, *others = parts
    return sum(others, first)


def divmod_(n, step):
    return (n, 0) if isinstance(step, int) and step == 1 else (n // step, n % step)


def silu(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-x))
