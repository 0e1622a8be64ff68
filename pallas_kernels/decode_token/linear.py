"""The linears of one group inside the kernel, in two phases with a grid-wide barrier between them.

    multiply   y_part[s] = W[:, slice s] x[slice s],   t_part[s] = A[e_u][:, slice s] x[slice s]      for its share of tiles
    finish     y = r · Σ_s y_part[s] + Σ_u B[e_u] (r · g_u · Σ_s t_part[s]) + bias                   then what follows it

x is the input times its norm's weight, and r = 1 / rms the norm's other factor, one number for each row of the batch: a linear
commutes with it. All products have the tile as the tensor cores' left operand [64, CHUNK] and x as the right one [CHUNK, N].
Sums are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.plan import CHUNK, PIECE, TILE, Group, Plan

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a vector [N], equal in all rows of a tile
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector [TILE], equal in all columns


def over_rows(vector, shape):
    """[N] → [TILE, N]."""
    return lax.broadcast_in_dim(vector, shape, [1])


def over_columns(vector, shape):
    """[TILE] → [TILE, N]."""
    return lax.broadcast_in_dim(vector, shape, [0])


def load(ref, layout=plgpu.Layout.WGMMA):
    return plgpu.load(ref, layout=layout, optimized=False)


def store_transposed(ref, tile):
    """ref [N, TILE] = tileᵀ."""
    ref.transpose((1, 0))[...] = plgpu.layout_cast(tile.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)


def load_transposed(ref):
    """[TILE, N] of ref [N, TILE]."""
    tile = load(ref.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def share(base, count, index, step):
    """Which of `count` things, the first of which has number `base`, have a number that is `index` modulo `step`:
    (the first of them, how many)."""
    first = (index + step - base % step) % step
    return first, jnp.maximum(0, (count - first + step - 1) // step)


class Ring:
    """Chunks of two halves, [2, TILE, PIECE], of weights on their way from device memory: one warpgroup fills slots, another one empties them. Both go
    through the same chunks in the same order, and each keeps a count of those that have passed."""

    def __init__(self, slots_smem: Any, full: Any, empty: Any):
        self.slots_smem, self.full, self.empty = slots_smem, full, empty
        self.num_slots = slots_smem.shape[0]

    def fill(self, count, *halves_gmem):
        """Copy the two halves of a chunk, [TILE, PIECE] each."""
        slot = count % self.num_slots

        @pl.when(count >= self.num_slots)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        for half, source_gmem in enumerate(halves_gmem):
            plgpu.copy_gmem_to_smem(source_gmem, self.slots_smem.at[slot, half], self.full.at[slot])
        return count + 1

    def take(self, count):
        """The halves of the next chunk, when they have come."""
        slot = count % self.num_slots
        plgpu.barrier_wait(self.full.at[slot])
        return self.slots_smem.at[slot, 0], self.slots_smem.at[slot, 1]

    def release(self, count):
        plgpu.barrier_arrive(self.empty.at[count % self.num_slots])


class Linears:
    """One group. `memory` has the refs: `weights`, `biases`, `a`, `b` by name; `y_part` [S, rows, N]; `t_part`
    [S, targets, U · pieces, PIECE, N]; `experts` [U], `num_used` [1], `gates` [U, N]; `squares` [tiles, N]."""

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

    @property
    def _used_pairs(self):
        return (self._used_pieces + 1) // 2

    def _shares(self, layer):
        """For the tiles of this block, experts' first: (count, the n-th one's rows of W or A, where its product goes)."""
        group, memory, plan = self.group, self.memory, self.plan
        active = self.member < group.members

        def clipped(share):
            return share[0], jnp.where(active, share[1], 0)

        for place, name in enumerate(group.adapted):
            base = group.num_tiles + place * self._used_pieces
            first, count = clipped(share(base, self._used_pieces, self.member, group.members))

            def factor(n, columns, name=name, first=first):
                expert, piece = divmod_(first + n * group.members, plan.rank_pieces)
                return memory.a[name].at[layer, memory.experts[expert], pl.ds(piece * PIECE, PIECE), columns]

            def to_t(n, place=place, first=first):
                return memory.t_part.at[self.slice, place, first + n * group.members]

            yield count, factor, to_t
        for name, out in zip(group.names, group.outs, strict=True):
            row = group.first_row(name)
            first, count = clipped(share(row // TILE, out // TILE, self.member, group.members))

            def weight(n, columns, name=name, first=first):
                rows = pl.ds((first + n * group.members) * TILE, TILE)
                stacked = memory.weights[name]
                return stacked.at[rows, columns] if name == "lm_head" else stacked.at[layer, rows, columns]

            def to_y(n, row=row, first=first):
                return memory.y_part.at[self.slice, pl.ds(row + (first + n * group.members) * TILE, TILE)]

            yield count, weight, to_y

    def copy_multiply(self, layer, count):
        for number, source, _ in self._shares(layer):

            def tile(n, count, source=source):
                def chunk(c, count):
                    start = (self.first_chunk + c) * CHUNK
                    return self.ring.fill(count, *(source(n, pl.ds(start + half, PIECE)) for half in (0, PIECE)))

                return lax.fori_loop(0, self.num_chunks, chunk, count)

            count = lax.fori_loop(0, number, tile, count)
        return count

    def multiply(self, layer, count, x_piece: Callable[[Any], Any], x_smem, x_full):
        """`x_piece(c)`: input columns [c · PIECE, (c + 1) · PIECE) as a ref [N, PIECE]."""

        def fetch(c, _):
            for half in (0, 1):
                plgpu.copy_gmem_to_smem(x_piece(2 * (self.first_chunk + c) + half), x_smem.at[c, half], x_full.at[c])

        def arrived(c, _):
            plgpu.barrier_wait(x_full.at[c])

        lax.fori_loop(0, self.num_chunks, fetch, None)
        lax.fori_loop(0, self.num_chunks, arrived, None)
        for number, _, target in self._shares(layer):

            def tile(n, count, target=target):
                def product(acc):
                    def chunk(c, count):
                        for half, w_smem in enumerate(self.ring.take(count)):
                            plgpu.wgmma(acc, w_smem, x_smem.at[c, half].transpose((1, 0)))
                        plgpu.wgmma_wait(2)

                        @pl.when(c > 0)
                        def _():
                            self.ring.release(count - 1)

                        return count + 1

                    after = lax.fori_loop(0, self.num_chunks, chunk, count)
                    plgpu.wgmma_wait(0)
                    self.ring.release(after - 1)
                    return acc[...], after

                y, count = pl.run_scoped(product, plgpu.ACC((TILE, self.plan.columns), jnp.float32))
                target(n)[...] = y
                return count

            count = lax.fori_loop(0, number, tile, count)
        return count

    def copy_finish(self, layer, count, passes: Sequence[tuple[str, ...]]):
        memory, plan = self.memory, self.plan
        for names in passes:
            first, number = self._finish_share(names)

            def tile(n, count, names=names, first=first):
                rows = pl.ds((first + n * plan.num_blocks) * TILE, TILE)
                for name in names:
                    if name not in self.group.adapted:
                        continue

                    def piece(p, name=name):
                        expert, part = divmod_(jnp.minimum(p, self._used_pieces - 1), plan.rank_pieces)
                        return memory.b[name].at[layer, memory.experts[expert], rows, pl.ds(part * PIECE, PIECE)]

                    def pair(i, count, piece=piece):
                        return self.ring.fill(count, piece(2 * i), piece(2 * i + 1))

                    count = lax.fori_loop(0, self._used_pairs, pair, count)
                return count

            count = lax.fori_loop(0, number, tile, count)
        return count

    def finish(self, layer, count, passes: Sequence[tuple[str, ...]], follow: Callable[..., None], h_smem):
        """`follow(names, row, values)` stores the values [TILE, N] at these rows of the linears `names`; linears of a pass
        are finished together."""
        plan = self.plan
        r = self._inverse_rms()
        for names in passes:
            first, number = self._finish_share(names)

            @pl.when(number > 0)
            def _(names=names):
                for place, name in enumerate(n for n in names if n in self.group.adapted):
                    self._gather_h(name, place, r, h_smem)
                plgpu.commit_smem()

            def tile(n, count, names=names, first=first):
                row, values = (first + n * plan.num_blocks) * TILE, []
                for name in names:
                    value, count = self._tile_of(name, names, layer, row, r, count, h_smem)
                    values.append(value)
                follow(names, row, values)
                return count

            count = lax.fori_loop(0, number, tile, count)
        return count

    def _finish_share(self, names):
        base = self.group.first_row(names[0]) // TILE
        return share(base, self.group.outs[self.group.names.index(names[0])] // TILE, self.block, self.plan.num_blocks)

    def _inverse_rms(self):
        """[N] of the group's input, or None where it is not normed."""
        if self.norm_dim is None:
            return None
        total = None
        for start in range(0, self.memory.squares.shape[0], TILE):
            part = load(self.memory.squares.at[pl.ds(start, TILE)])
            tiles = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA) + start
            part = jnp.where(tiles < self.norm_dim // TILE, part, 0).sum(axis=0)
            total = part if total is None else total + part
        return lax.rsqrt(total / self.norm_dim + self.eps)

    def _gather_h(self, name, place, r, h_smem):
        """h = r · g_u · Σ_s t_part[s], rounded, as the right operand of B."""
        plan, memory, where = self.plan, self.memory, self.group.adapted.index(name)

        def piece(p, _):
            there = jnp.minimum(p, self._used_pieces - 1)  # an odd last piece is multiplied together with one of zeros
            t = load(memory.t_part.at[0, where, there])
            for s in range(1, self.group.slices):
                t += load(memory.t_part.at[s, where, there])
            factor = load(memory.gates.at[divmod_(there, plan.rank_pieces)[0]], COLUMNS)
            factor *= (p < self._used_pieces).astype(jnp.float32)
            factor = factor if r is None else factor * r
            store_transposed(h_smem.at[place, p], t * over_rows(factor, t.shape))

        lax.fori_loop(0, 2 * self._used_pairs, piece, None)

    def _tile_of(self, name, names, layer, row, r, count, h_smem):
        group, memory = self.group, self.memory
        rows = pl.ds(group.first_row(name) + row, TILE)
        y = load(memory.y_part.at[0, rows])
        for s in range(1, group.slices):
            y += load(memory.y_part.at[s, rows])
        if r is not None:
            y *= over_rows(r, y.shape)
        if name in group.adapted:
            place = [n for n in names if n in group.adapted].index(name)

            def expand(acc):
                def pair(i, count):
                    for half, b_smem in enumerate(self.ring.take(count)):
                        plgpu.wgmma(acc, b_smem, h_smem.at[place, 2 * i + half].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    self.ring.release(count)
                    return count + 1

                after = lax.fori_loop(0, self._used_pairs, pair, count)
                return acc[...], after

            expanded, count = pl.run_scoped(expand, plgpu.ACC((TILE, self.plan.columns), jnp.float32))
            y += expanded
        bias = memory.biases.get(name)
        if bias is not None:
            y += over_columns(load(bias.at[layer, pl.ds(row, TILE)], ROWS).astype(jnp.float32), y.shape)
        return y, count


def divmod_(n, step: int):
    return (n, 0) if step == 1 else (n // step, n % step)


def silu(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.exp(-x))
