"""The tile schedule: which CTA computes which tile of a group, in which order.

`TileSchedule` of one CTA numbers its tiles 0 … num_a + num_w + num_b − 1: tiles of the experts' A, then of W, then of the
experts' B. The same code runs inside the kernel, on traced numbers, and in the NumPy executor and the tests, on plain
ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.megakernel.plan import Group, Plan
from pallas_kernels.megakernel.sizes import TILE_K, TILE_M, WGMMA_N


def div(n: Any, d: Any) -> Any:
    """⌊n / d⌋ of what is not negative, as all numbers in the kernels: `//` would ask for the sign first, as `%` would,
    which takes a third of the time to compile."""
    return n // d if isinstance(n, int) and isinstance(d, int) else lax.div(n, jnp.int32(d))


def rem(n: Any, d: Any) -> Any:
    """n modulo d, of what is not negative."""
    return n % d if isinstance(n, int) and isinstance(d, int) else lax.rem(n, jnp.int32(d))


def where(condition: Any, x: Any, y: Any) -> Any:
    """x if `condition` else y; of plain numbers a plain one, as in the executor and the tests."""
    return (x if condition else y) if _plain(condition, x, y) else jnp.where(condition, x, y)


def minimum(x: Any, y: Any) -> Any:
    return min(x, y) if _plain(x, y) else jnp.minimum(x, y)


def maximum(x: Any, y: Any) -> Any:
    return max(x, y) if _plain(x, y) else jnp.maximum(x, y)


def clip(x: Any, low: int, high: int) -> Any:
    return min(max(x, low), high) if _plain(x) else jnp.clip(x, low, high)


def _plain(*values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


def div_rem(n, step):
    return (n, 0) if isinstance(step, int) and step == 1 else (div(n, step), rem(n, step))


def div_rem_by_comparing(n, step, most):
    """(n // step, n % step) of a quotient below `most`; of a larger one, anything."""
    quotient = sum(
        (where(n >= i * step, 1, 0) for i in range(1, most)), start=0 if isinstance(n, int) else jnp.int32(0)
    )
    return quotient, n - quotient * step


def strided_share(base, count, index, step):
    """(first, number) of those i in 0 … count − 1 for which base + i ≡ index (mod step)."""
    first = rem(index + step - rem(base, step), step)
    return first, div(maximum(0, count - first + step - 1), step)


def select(values: Sequence[Any], index):
    """values[index]."""
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        chosen = where(index == i, value, chosen)
    return chosen


class Scalars(NamedTuple):
    """The numbers that decide where weights are read, in registers from the launch's start: each of them is a way to
    the L2 cache and back, which the copies of a phase would wait for."""

    experts: Any
    """[U]: those in use, first; the ref itself where they are too many for registers."""
    num_used: Any
    positions: list[Any]
    """[B]: where the rows' tokens are; none where that does not matter."""

    @classmethod
    def load(cls, experts: Any, num_used: Any, positions: Any, *, many_experts: bool = False) -> Scalars:
        """Load the scalars from refs in device memory, or None; `many_experts` stay there, where the L1 cache has them."""

        def all_of(ref):
            return [] if ref is None else [ref[i] for i in range(ref.shape[0])]

        return cls(experts if many_experts else all_of(experts), (all_of(num_used) or [0])[0], all_of(positions))


def expert_ranks(scalars: Scalars, plan: Plan, rank_tile: Any) -> tuple[Any, Any]:
    """(expert, its ranks) of one of the rank tiles of all experts in use."""
    number, part = div_rem(rank_tile, plan.rank_tiles)
    if isinstance(scalars.experts, list):
        return select(scalars.experts, number), pl.ds(part * TILE_K, TILE_K)
    return scalars.experts[number], pl.ds(part * TILE_K, TILE_K)


class Tile(NamedTuple):
    """A row of chunks of A, W or B to multiply with the input: it gives one partial sum. A tile of A is a pair of rank
    tiles, each half as high as a tile of weights."""

    is_a: Any
    is_b: Any
    source: Any
    """Index among the group's weights: the adapted linears' A, then all linears' W, then the adapted ones' B."""
    first: Any
    """Index of its first chunk; those of A are K-tiles, those of B rank tiles."""
    chunks: Any
    """Number of its chunks: 0 where a linear has no B."""
    linear: Any
    """Index of the linear in the group, for a tile of W or B."""
    adapted_index: Any
    """Index of the linear among the adapted ones, for a tile of A or B."""
    tile: Any
    """Index of the tile in its linear; for a tile of A, of the pair of rank tiles."""
    partial: Any
    """Number of the partial sum."""


class TileSchedule:
    """The tiles of one CTA, which computes one slice of the units of one CTA group."""

    def __init__(self, group: Group, plan: Plan, scalars: Scalars, cta: Any):
        self.group, self.plan, self.scalars, self.cta = group, plan, scalars, cta
        self.slice, self.cta_group = rem(cta, group.split_k), div(cta, group.split_k)
        self.first_chunk = div(self.slice * group.chunks, group.split_k)
        self.num_chunks = div((self.slice + 1) * group.chunks, group.split_k) - self.first_chunk
        self.first_k_tile, self.num_k_tiles = (n * group.chunk_k_tiles for n in (self.first_chunk, self.num_chunks))
        self.num_units, self.unit = self.units()
        self.num_w = self.num_units * group.width
        self.num_a: Any = 0
        self.num_b: Any = 0
        if group.adapted:
            self.num_a, self.a_tile = self.a_tiles()
            self.num_b, self.b_tile = self.b_tiles()

    @property
    def used_rank_tiles(self):
        return self.scalars.num_used * self.plan.rank_tiles

    def a_tiles(self):
        """(how many tiles of A are this CTA's, n ↦ (adapted linear, pair of rank tiles, part of the slice)).
        Underloaded CTA groups take their quota first, and the others the rest, from the last one on."""
        group, each = self.group, self._a_tiles_each
        total = len(group.adapted) * each
        quota = minimum(total, group.underloaded_groups * group.a_tile_quota)
        is_underloaded, underloaded = self.cta_group >= group.loaded_groups, max(1, group.underloaded_groups)
        step = where(is_underloaded, underloaded, group.loaded_groups)
        of_underloaded = strided_share(0, quota, self.cta_group - group.loaded_groups, underloaded)
        first, of_loaded = strided_share(
            0, total - quota, group.loaded_groups - 1 - self.cta_group, group.loaded_groups
        )
        first, number = (
            where(is_underloaded, *pair) for pair in zip(of_underloaded, (quota + first, of_loaded), strict=True)
        )

        def at(n):
            adapted_index, tile = div_rem_by_comparing(first + n * step, each, len(group.adapted))
            return adapted_index, *div_rem(tile, group.a_split_k)

        return where(self.cta_group < group.cta_groups, number, 0), at

    @property
    def _a_tiles_each(self):
        """Tiles of A for one slice of one linear."""
        return div(self.used_rank_tiles + 1, 2) * self.group.a_split_k

    def num_a_ctas(self):
        """Number of CTAs that have tiles of A."""
        group, number = self.group, len(self.group.adapted) * self._a_tiles_each
        underloaded = minimum(number, group.underloaded_groups if group.a_tile_quota else 0)
        loaded = clip(number - group.underloaded_groups * group.a_tile_quota, 0, group.loaded_groups)
        return group.split_k * (underloaded + loaded)

    def a_chunks(self, part):
        """(first chunk, how many) of a part of this CTA's slice."""
        low, high = (div(self.num_k_tiles * i, self.group.a_split_k) for i in (part, part + 1))
        return self.first_k_tile + low, high - low

    def units(self):
        """(how many units are this CTA's, n ↦ unit)."""
        first, number = strided_share(0, self.group.num_units, self.cta_group, self.group.cta_groups)
        number = where(self.cta_group < self.group.cta_groups, number, 0)
        return number, lambda n: first + n * self.group.cta_groups

    def linear_of(self, unit, place):
        """(number of the linear in the group, its tile) at a place of a unit."""
        number: Any = 0
        tile = unit
        for names in self.group.passes[1:]:
            begin = self.group.first_unit(names)
            number, tile = where(unit >= begin, number + 1, number), where(unit >= begin, unit - begin, tile)
        return number * self.group.width + place, tile

    def tile_number(self, linear, tile):
        """Index of a linear's tile among the tiles of all linears of the group."""
        return select([self.group.first_tile(name) for name in self.group.outs], linear) + tile

    def tile(self, n):
        """The n-th of this CTA's tiles: `num_a` of A, then `num_w` of W and `num_b` of B. What it would be of each kind
        is computed for every n, and is meaningless for two of them."""
        group, first_w, first_b = self.group, self.num_a, self.num_a + self.num_w
        is_a, is_b, linears = n < first_w, n >= first_b, len(group.outs)
        factors = len(group.adapted)  # A among the sources

        index, i = div_rem(n - first_w, group.width)
        linear, tile = self.linear_of(self.unit(index), i)
        w = Tile(is_a, is_b, factors + linear, self.first_chunk, self.num_chunks, linear, 0, tile, self.slice)
        if not group.adapted:
            return w._replace(is_a=False, is_b=False)

        linear, tile, adapted_index, rank_tiles = self.b_tile(n - first_b)
        source = factors + linears + adapted_index
        b = Tile(is_a, is_b, source, 0, rank_tiles, linear, adapted_index, tile, group.split_k)
        either = Tile(*(where(is_b, i, j) for i, j in zip(b, w, strict=True)))
        adapted_index, pair, part = self.a_tile(n)
        first, chunks = self.a_chunks(part)
        a = Tile(is_a, is_b, adapted_index, first, chunks, 0, adapted_index, pair, self.slice * group.a_split_k + part)
        return Tile(*(where(is_a, i, j) for i, j in zip(a, either, strict=True)))

    @property
    def n_tiles(self):
        """Column tiles of `WGMMA_N` rows of the batch."""
        return self.plan.padded_batch // WGMMA_N

    @property
    def n_tiles_at_once(self):
        """N-tiles that a CTA finishes together: a sum waits for its partials, and two for theirs no longer."""
        return min(2, self.n_tiles)

    def epilogue_share(self):
        """(how many times this CTA finishes N-tiles of units, n ↦ (unit, half of the tile, first N-tile)): the CTAs of
        a CTA group share those of its units."""
        each = 2 * self.n_tiles // self.n_tiles_at_once
        first, number = strided_share(0, self.num_units * each, self.slice, self.group.split_k)

        def at(n):
            index, place = div_rem(first + n * self.group.split_k, each)
            half, i = div_rem(place, self.n_tiles // self.n_tiles_at_once)
            return self.unit(index), half, i * self.n_tiles_at_once

        return number, at

    @property
    def h_tiles(self):
        """Tiles [TILE_K, WGMMA_N] of h, of all adapted linears."""
        return len(self.group.adapted) * self.used_rank_tiles * self.n_tiles

    def h_share(self):
        """(the first tile of h that this CTA reduces, how many)."""
        group, from_last = self.group, self.plan.num_ctas - 1 - self.cta
        first, number = strided_share(0, self.h_tiles, from_last, group.reducer_ctas)
        return first, where(from_last < group.reducer_ctas, number, 0)

    @property
    def h_comes_in_pieces(self) -> bool:
        """True if a tile of B is multiplied in pieces, each with its rank tiles of h in shared memory."""
        return bool(self.group.adapted) and self.plan.h_rank_tiles < self.plan.max_rank_tiles

    def num_h_pieces(self, is_b, chunks):
        """Pieces of a tile of so many chunks; a tile of A or W is one."""
        return where(is_b, div(chunks + self.plan.h_rank_tiles - 1, self.plan.h_rank_tiles), 1)

    def h_piece(self, is_b, chunks, piece):
        """(first chunk, how many) of a piece."""
        first = piece * self.plan.h_rank_tiles
        return first, where(is_b, minimum(chunks - first, self.plan.h_rank_tiles), chunks)

    def b_tiles(self):
        """(how many tiles of B are this CTA's, n ↦ (linear, tile, its number among the adapted, rank tiles: none if it
        is not adapted)). The CTAs of a CTA group share those of its units."""
        group = self.group
        first, number = strided_share(0, self.num_units * group.width, self.slice, group.split_k)
        adapted = [group.adapted.index(name) if name in group.adapted else 0 for name in group.outs]

        def at(n):
            # Those of one linear after the other: a slice would get the same linear of every unit, and its h every time.
            place, index = div_rem_by_comparing(first + n * group.split_k, self.num_units, group.width)
            linear, tile = self.linear_of(self.unit(index), place)
            adapted_index = select(adapted, linear)
            return linear, tile, adapted_index, where(self.is_adapted(linear), self.used_rank_tiles, 0)

        return number, at

    def is_adapted(self, linear):
        """True if the linear with this number has experts: a Python bool where it is the same for all."""
        those = [name in self.group.adapted for name in self.group.outs]
        return those[0] if len(set(those)) == 1 else select(those, linear)


class AttentionSchedule:
    """The units of attention of one CTA: one row, up to WGMMA_N query heads of one key-value head, and one of the parts of
    the context. `group_size`: query heads of a key."""

    def __init__(self, plan: Plan, batch: int, num_kv_heads: int, group_size: int, cta: Any):
        self.plan, self.batch, self.num_kv_heads, self.cta = plan, batch, num_kv_heads, cta
        self.groups = -(-group_size // WGMMA_N)

    def share(self, splits):
        """(the first unit of this CTA, how many: every `num_ctas`-th)."""
        units = self.batch * self.num_kv_heads * self.groups * splits
        return strided_share(0, units, self.cta, self.plan.num_ctas)

    def unit(self, number, splits):
        """(row, key-value head, group of its queries, part of the context)."""
        unit, split = div_rem(number, splits)
        unit, group = div_rem(unit, self.groups)
        return *div_rem(unit, self.num_kv_heads), group, split

    def tiles(self, position, window, split):
        """(first, how many) tiles of the cache belong to this part: those with positions in the window, shared evenly."""
        begin = div(maximum(position - window + 1, 0), TILE_M)
        tiles = div(position + TILE_M - 1, TILE_M) - begin
        low, high = (div(tiles * i, self.plan.context_splits) for i in (split, split + 1))
        return begin + low, high - low
