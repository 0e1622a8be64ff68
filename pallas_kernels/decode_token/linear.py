"""The linears of one group inside the kernel, in two phases with a grid-wide barrier between them.

    multiply   y_part[s] = W[:, slice s] x[slice s],   t_part[s] = A[e_u][:, slice s] x[slice s]      for its share of tiles
    finish     y = r · Σ_s y_part[s] + Σ_u B[e_u] (r · g_u · Σ_s t_part[s]) + bias                   then what follows it

x is the input times its norm's weight, and r = 1 / rms the norm's other factor, one number for each row of the batch: a
linear commutes with it. The tensor cores multiply halves of tiles, [HALF, PIECE], with [PIECE, N]; sums are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.plan import HALF, PIECE, TILE, Group, Plan, num_tiles

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a vector [N], equal in all rows of a tile
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector [HALF], equal in all columns


def over_rows(vector, shape):
    """[N] → [HALF, N]."""
    return lax.broadcast_in_dim(vector, shape, [1])


def over_columns(vector, shape):
    """[HALF] → [HALF, N]."""
    return lax.broadcast_in_dim(vector, shape, [0])


def load(ref, layout=plgpu.Layout.WGMMA):
    return plgpu.load(ref, layout=layout, optimized=False)


def store_transposed(ref, tile):
    """ref [N, HALF] = tileᵀ."""
    ref.transpose((1, 0))[...] = plgpu.layout_cast(tile.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)


def load_transposed(ref):
    """[HALF, N] of ref [N, HALF]."""
    tile = load(ref.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def share(base, count, index, step):
    """Which of `count` things, the first of which has number `base`, have a number that is `index` modulo `step`:
    (the first of them, how many)."""
    first = (index + step - base % step) % step
    return first, jnp.maximum(0, (count - first + step - 1) // step)


class Ring:
    """Chunks of weights, [TILE, PIECE] or the first rows of that, on their way from device memory to the tensor cores. One
    warpgroup fills the slots and one empties them; both go through the same chunks in the same order, and each keeps a
    count of those it has passed."""

    def __init__(self, slots_smem: Any, full: Any, empty: Any):
        self.slots_smem, self.full, self.empty = slots_smem, full, empty
        self.num_slots = slots_smem.shape[0]

    def fill(self, count, source_gmem):
        slot = count % self.num_slots

        @pl.when(count >= self.num_slots)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        rows = source_gmem.shape[0]
        slot_smem = self.slots_smem.at[slot] if rows == TILE else self.slots_smem.at[slot, pl.ds(0, rows)]
        plgpu.copy_gmem_to_smem(source_gmem, slot_smem, self.full.at[slot])
        return count + 1

    def take(self, count):
        """The next chunk, when it has come."""
        slot = count % self.num_slots
        plgpu.barrier_wait(self.full.at[slot])
        return self.slots_smem.at[slot]

    def release(self, count):
        plgpu.barrier_arrive(self.empty.at[count % self.num_slots])


class Linears:
    """One group. `memory` has the refs: `weights`, `biases`, `a`, `b` by name; `y_part` [S, tiles, 2, HALF, N]; `t_part`
    [S, targets, U · pieces, PIECE, N]; `experts` [U], `num_used` [1], `gates` [U, N]; `squares` [halves of tiles, N]; `r`
    [blocks, N]."""

    def __init__(self, group: Group, plan: Plan, memory: Any, ring: Ring, *, norm_dim: int | None, eps: float):
        self.group, self.plan, self.memory, self.ring = group, plan, memory, ring
        self.norm_dim, self.eps = norm_dim, eps
        self.block = lax.axis_index("block")
        self.slice, self.member = self.block % group.slices, self.block // group.slices
        self.first_chunk = self.slice * group.chunks // group.slices
        self.num_chunks = (self.slice + 1) * group.chunks // group.slices - self.first_chunk

    @property
    def _used_pieces(self):
        return self.memory.num_used[0] * self.plan.rank_pieces

    def _shares(self, layer):
        """Of this block, experts' first: (how many tiles, the n-th one's columns as a ref, where its products go)."""
        group, memory, plan = self.group, self.memory, self.plan

        def clipped(share):
            return share[0], jnp.where(self.member < group.members, share[1], 0)

        for place, name in enumerate(group.adapted):
            base = group.num_tiles + place * self._used_pieces
            first, count = clipped(share(base, self._used_pieces, self.member, group.members))

            def factor(n, columns, name=name, first=first):
                expert, piece = divmod_(first + n * group.members, plan.rank_pieces)
                return memory.a[name].at[layer, memory.experts[expert], pl.ds(piece * PIECE, PIECE), columns]

            def to_t(n, place=place, first=first):
                return [memory.t_part.at[self.slice, place, first + n * group.members]]

            yield count, factor, to_t
        for name, out in zip(group.names, group.outs, strict=True):
            base = group.first_tile(name)
            first, count = clipped(share(base, num_tiles(out), self.member, group.members))

            def weight(n, columns, name=name, first=first):
                rows = pl.ds((first + n * group.members) * TILE, TILE)
                stacked = memory.weights[name]
                return stacked.at[rows, columns] if name == "lm_head" else stacked.at[layer, rows, columns]

            def to_y(n, base=base, first=first):
                tile = base + first + n * group.members
                return [memory.y_part.at[self.slice, tile, half] for half in (0, 1)]

            yield count, weight, to_y

    def copy_multiply(self, layer, count):
        for number, source, _ in self._shares(layer):

            def tile(n, count, source=source):
                def chunk(c, count):
                    return self.ring.fill(count, source(n, pl.ds((self.first_chunk + c) * PIECE, PIECE)))

                return lax.fori_loop(0, self.num_chunks, chunk, count)

            count = lax.fori_loop(0, number, tile, count)
        return count

    def multiply(self, layer, count, x_piece: Callable[[Any], Any], x_smem):
        """`x_piece(c)`: input columns [c · PIECE, (c + 1) · PIECE) as a ref [N, PIECE]. Leaves r, where there is a norm, in
        `memory.r`: found here, where weights are on their way, it makes nobody wait."""
        last = self.group.chunks - 1
        pieces = [x_piece(jnp.minimum(self.first_chunk + c, last)) for c in range(self.group.slice_chunks)]
        tiles = [load(piece.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED) for piece in pieces]
        for c, tile in enumerate(tiles):
            x_smem.at[c].transpose((1, 0))[...] = tile
        plgpu.commit_smem()
        for place, (number, _, targets) in enumerate(self._shares(layer)):
            if place == min(1, len(self.group.names) - 1) and self.norm_dim is not None:
                self.memory.r.at[self.block][...] = self._inverse_rms()

            def tile(n, count, targets=targets):
                refs = targets(n)
                *products, count = self._products(count, self.num_chunks, lambda c: x_smem.at[c], len(refs))
                for ref, product in zip(refs, products, strict=True):
                    ref[...] = product
                return count

            count = lax.fori_loop(0, number, tile, count)
        return count

    def _products(self, count, number, right_smem: Callable[[Any], Any], halves: int):
        """Σ_c chunk_c right_c of the next `number` chunks, [HALF, N] for each half, and the new count."""

        def product(*accs):
            def chunk(c, count):
                chunk_smem = self.ring.take(count)
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
            self.ring.release(after - 1)
            return *(acc[...] for acc in accs), after

        return pl.run_scoped(product, *[plgpu.ACC((HALF, self.plan.columns), jnp.float32)] * halves)

    def copy_finish(self, layer, count, passes: Sequence[tuple[str, ...]]):
        memory, plan = self.memory, self.plan
        for names in passes:
            first, number = self._finish_share(names)

            def tile(n, count, names=names, first=first):
                rows = pl.ds((first + n * plan.num_blocks) * TILE, TILE)
                for name in names:
                    if name not in self.group.adapted:
                        continue

                    def piece(p, count, name=name):
                        expert, part = divmod_(p, plan.rank_pieces)
                        ranks = pl.ds(part * PIECE, PIECE)
                        return self.ring.fill(count, memory.b[name].at[layer, memory.experts[expert], rows, ranks])

                    count = lax.fori_loop(0, self._used_pieces, piece, count)
                return count

            count = lax.fori_loop(0, number, tile, count)
        return count

    def finish(
        self,
        layer,
        count,
        passes: Sequence[tuple[str, ...]],
        follow: Callable[..., Callable[..., None]],
        h_smem,
    ):
        """`follow(names, row)` reads what it needs for these rows of the linears `names`, and returns the function that
        takes their values [HALF, N] and stores what comes of them. Linears of a pass have equal shapes."""
        plan, group = self.plan, self.group
        r = None if self.norm_dim is None else load(self.memory.r.at[self.block], COLUMNS)
        for names in passes:
            first, number = self._finish_share(names)
            out_dim = group.outs[group.names.index(names[0])]

            @pl.when(number > 0)
            def _(names=names):
                for place, name in enumerate(n for n in names if n in group.adapted):
                    self._gather_h(name, place, r, h_smem)
                plgpu.commit_smem()

            def tile(n, count, names=names, first=first, out_dim=out_dim):
                tile = first + n * plan.num_blocks
                rows = [jnp.minimum(tile * TILE + half * HALF, out_dim - HALF) for half in (0, 1)]
                stores, values = [follow(names, row) for row in rows], []
                for name in names:
                    *halves, count = self._tile_of(name, names, layer, tile, rows, r, count, h_smem)
                    values.append(halves)
                for half in (0, 1):
                    store, these = stores[half], [halves[half] for halves in values]
                    if half == 0 or out_dim % TILE == 0:
                        store(*these)
                    else:
                        pl.when(tile * TILE + HALF < out_dim)(partial(store, *these))
                return count

            count = lax.fori_loop(0, number, tile, count)
        return count

    def _finish_share(self, names):
        group = self.group
        tiles = num_tiles(group.outs[group.names.index(names[0])])
        return share(group.first_tile(names[0]), tiles, self.block, self.plan.num_blocks)

    def _inverse_rms(self):
        """r [N] of the group's input."""
        assert self.norm_dim is not None
        total: Any = 0.0
        for start in range(0, self.memory.squares.shape[0], HALF):
            part = load(self.memory.squares.at[pl.ds(start, HALF)])
            numbers = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA) + start
            part = jnp.where(numbers < self.norm_dim // HALF, part, 0).sum(axis=0)
            total += part
        return lax.rsqrt(total / self.norm_dim + self.eps)

    def _gather_h(self, name, place, r, h_smem):
        """h = r · g_u · Σ_s t_part[s], rounded, as the right operand of B."""
        plan, memory, where = self.plan, self.memory, self.group.adapted.index(name)

        def piece(p, _):
            t = sum_of(load(memory.t_part.at[s, where, p]) for s in range(self.group.slices))
            factor = load(memory.gates.at[divmod_(p, plan.rank_pieces)[0]], COLUMNS)
            factor = factor if r is None else factor * r
            store_transposed(h_smem.at[place, p], t * over_rows(factor, t.shape))

        lax.fori_loop(0, self._used_pieces, piece, None)

    def _tile_of(self, name, names, layer, tile, rows, r, count, h_smem):
        """The two halves of a tile, [HALF, N] each, and the new count."""
        group, memory = self.group, self.memory
        at = group.first_tile(name) + tile
        bias, shape = memory.biases.get(name), (HALF, self.plan.columns)
        biases = [] if bias is None else [load(bias.at[layer, pl.ds(row, HALF)], ROWS) for row in rows]
        halves = [sum_of(load(memory.y_part.at[s, at, half]) for s in range(group.slices)) for half in (0, 1)]
        if r is not None:
            halves = [y * over_rows(r, y.shape) for y in halves]
        if name in group.adapted:
            place = [n for n in names if n in group.adapted].index(name)
            *expanded, count = self._products(count, self._used_pieces, lambda p: h_smem.at[place, p], 2)
            halves = [y + more for y, more in zip(halves, expanded, strict=True)]
        for half, values in enumerate(biases):
            halves[half] += over_columns(values.astype(jnp.float32), shape)
        return *halves, count


def sum_of(parts):
    first, *others = parts
    return sum(others, first)


def divmod_(n, step: int):
    return (n, 0) if step == 1 else (n // step, n % step)


def silu(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-x))
