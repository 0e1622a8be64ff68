"""Which thread block does what of a group of linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.decode_token.plan import PIECE, QUERIES, Group, Plan, div, rem


def share(base, count, index, step):
    """Which of `count` things, the first of which has number `base`, have a number that is `index` modulo `step`:
    (the first of them, how many)."""
    first = rem(index + step - rem(base, step), step)
    return first, div(jnp.maximum(0, count - first + step - 1), step)


class Scalars(NamedTuple):
    """What decides where weights are read, in registers from the launch's start: each of them is a way to the L2 cache and
    back, which the copies of a phase would wait for."""

    experts: list[Any]
    """[U]: those in use, first."""
    num_used: Any
    positions: list[Any]
    """[B]: where the rows' tokens are; none where that does not matter."""

    @classmethod
    def of(cls, memory: Any) -> Scalars:
        def all_of(name):
            ref = getattr(memory, name, None)
            return [] if ref is None else [ref[i] for i in range(ref.shape[0])]

        return cls(all_of("experts"), (all_of("num_used") or [0])[0], all_of("positions"))


def ranks_of(scalars: Scalars, plan: Plan, piece: Any) -> tuple[Any, Any]:
    """(expert, its ranks) of a piece of the ranks of all experts in use."""
    number, part = divmod_(piece, plan.rank_pieces)
    return pick(scalars.experts, number), pl.ds(part * PIECE, PIECE)


def pick(values: Sequence[Any], index):
    """values[index]."""
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        chosen = jnp.where(index == i, value, chosen)
    return chosen


def divmod_by_comparing(n, step, most):
    """(n // step, n % step) of a quotient below `most`; of a larger one, something."""
    quotient = sum((jnp.where(n >= i * step, 1, 0) for i in range(1, most)), start=jnp.int32(0))
    return quotient, n - quotient * step


def divmod_(n, step):
    return (n, 0) if isinstance(step, int) and step == 1 else (div(n, step), rem(n, step))


class Product(NamedTuple):
    """Chunks of a row of tiles of A, W or B times what they need of the input: a part of a sum. A tile of A is two pieces of
    ranks, each half a tile."""

    of_a: Any
    of_b: Any
    source: Any
    """Which of the group's weights: the adapted linears' A, then all linears' W, then the adapted ones' B."""
    first: Any
    """Of the chunks; those of B are pieces of ranks."""
    chunks: Any
    """How many there are: none where a linear has no B."""
    linear: Any
    """Of W and B: its number in the group."""
    place: Any
    """Of A and B: the linear's place among the adapted ones."""
    tile: Any
    """Of A, the pair of pieces."""
    part: Any
    """Of the sum."""


class Shares:
    """What is the share of one block, which takes one slice of the units of one member. Numbers are traced."""

    def __init__(self, group: Group, plan: Plan, scalars: Scalars, block: Any):
        self.group, self.plan, self.scalars, self.block = group, plan, scalars, block
        self.slice, self.member = rem(block, group.slices), div(block, group.slices)
        self.first_chunk = div(self.slice * group.chunks, group.slices)
        self.num_chunks = div((self.slice + 1) * group.chunks, group.slices) - self.first_chunk
        self.num_units, self.unit = self.units()
        self.num_w = self.num_units * group.width
        self.num_a: Any = 0
        self.num_b: Any = 0
        if group.adapted:
            self.num_a, self.a_product = self.a_products()
            self.num_b, self.b_tile = self.b_tiles()

    @property
    def used_pieces(self):
        return self.scalars.num_used * self.plan.rank_pieces

    def a_products(self):
        """(how many products of A are this block's, the n-th one's linear, pair of pieces and part). Light members take
        their quota first, and the others the rest, from the last one on."""
        group, each = self.group, self._a_products_each
        total = len(group.adapted) * each
        quota = jnp.minimum(total, group.light * group.quota)
        is_light, light = self.member >= group.heavy, max(1, group.light)
        step = jnp.where(is_light, light, group.heavy)
        of_light = share(0, quota, self.member - group.heavy, light)
        first, of_heavy = share(0, total - quota, group.heavy - 1 - self.member, group.heavy)
        first, number = (jnp.where(is_light, *pair) for pair in zip(of_light, (quota + first, of_heavy), strict=True))

        def at(n):
            place, product = divmod_by_comparing(first + n * step, each, len(group.adapted))
            return place, *divmod_(product, group.a_parts)

        return jnp.where(self.member < group.members, number, 0), at

    @property
    def _a_products_each(self):
        """Products of A for one slice of one linear."""
        return div(self.used_pieces + 1, 2) * self.group.a_parts

    def a_blocks(self):
        """How many blocks have products of A."""
        group, number = self.group, len(self.group.adapted) * self._a_products_each
        light = jnp.minimum(number, group.light if group.quota else 0)
        others = jnp.clip(number - group.light * group.quota, 0, group.heavy)
        return group.slices * (light + others)

    def chunks_of(self, part):
        """(first chunk, how many) of a part of this block's slice."""
        low, high = (div(self.num_chunks * i, self.group.a_parts) for i in (part, part + 1))
        return self.first_chunk + low, high - low

    def units(self):
        """(how many units are this block's, the n-th one)."""
        first, number = share(0, self.group.num_units, self.member, self.group.members)
        number = jnp.where(self.member < self.group.members, number, 0)
        return number, lambda n: first + n * self.group.members

    def linear_of(self, unit, place):
        """(the number of a linear of the group, its tile) at a place of one of all units."""
        number: Any = 0
        tile = unit
        for names in self.group.passes[1:]:
            begin = self.group.first_unit(names)
            number, tile = jnp.where(unit >= begin, number + 1, number), jnp.where(unit >= begin, unit - begin, tile)
        return number * self.group.width + place, tile

    def tile_number(self, linear, tile):
        """Of a linear's tile, among those of all linears of the group."""
        return pick([self.group.first_tile(name) for name in self.group.outs], linear) + tile

    def product(self, n):
        """The n-th of this block's products: `num_a` of A, then `num_w` of W and `num_b` of B. What it would be of each
        kind is found out for every n, and is nonsense for two of them."""
        group, first_w, first_b = self.group, self.num_a, self.num_a + self.num_w
        of_a, of_b, linears = n < first_w, n >= first_b, len(group.outs)
        factors = len(group.adapted)  # A among the sources

        index, i = divmod_(n - first_w, group.width)
        linear, tile = self.linear_of(self.unit(index), i)
        w = Product(of_a, of_b, factors + linear, self.first_chunk, self.num_chunks, linear, 0, tile, self.slice)
        if not group.adapted:
            return w._replace(of_a=False, of_b=False)

        linear, tile, place, pieces = self.b_tile(n - first_b)
        b = Product(of_a, of_b, factors + linears + place, 0, pieces, linear, place, tile, group.slices)
        either = Product(*(jnp.where(of_b, i, j) for i, j in zip(b, w, strict=True)))
        place, pair, part = self.a_product(n)
        first, chunks = self.chunks_of(part)
        a = Product(of_a, of_b, place, first, chunks, 0, place, pair, self.slice * group.a_parts + part)
        return Product(*(jnp.where(of_a, i, j) for i, j in zip(a, either, strict=True)))

    @property
    def narrow(self):
        """Pieces of `QUERIES` columns that a tile's columns are."""
        return self.plan.columns // QUERIES

    @property
    def at_once(self):
        """Narrow pieces that a block finishes together: a sum waits for its parts, and two for theirs no longer."""
        return min(2, self.narrow)

    def finish_share(self):
        """(how many times this block finishes narrow pieces of units, the unit, half, and first piece of the n-th time): the
        blocks of a member share those of its units."""
        each = 2 * self.narrow // self.at_once
        first, number = share(0, self.num_units * each, self.slice, self.group.slices)

        def at(n):
            index, piece = divmod_(first + n * self.group.slices, each)
            half, i = divmod_(piece, self.narrow // self.at_once)
            return self.unit(index), half, i * self.at_once

        return number, at

    @property
    def h_pieces(self):
        """Of all adapted linears, [PIECE, QUERIES]."""
        return len(self.group.adapted) * self.used_pieces * self.narrow

    def h_share(self):
        """(the first piece of h that this block gathers, how many)."""
        group, from_last = self.group, self.plan.num_blocks - 1 - self.block
        first, number = share(0, self.h_pieces, from_last, group.gatherers)
        return first, jnp.where(from_last < group.gatherers, number, 0)

    def b_tiles(self):
        """(how many tiles are this block's to add B's products to, the n-th one's linear, tile, place among the adapted, and
        how many pieces it has: none if it is not adapted). The blocks of a member share those of its units."""
        group = self.group
        first, number = share(0, self.num_units * group.width, self.slice, group.slices)
        places = [group.adapted.index(name) if name in group.adapted else 0 for name in group.outs]

        def at(n):
            # Those of one linear after the other: a slice would get the same linear of every unit, and its h every time.
            place, index = divmod_by_comparing(first + n * group.slices, self.num_units, group.width)
            linear, tile = self.linear_of(self.unit(index), place)
            return linear, tile, pick(places, linear), jnp.where(self.is_adapted(linear), self.used_pieces, 0)

        return number, at

    def is_adapted(self, linear):
        """By number; False or True where it is the same for all."""
        those = [name in self.group.adapted for name in self.group.outs]
        return those[0] if len(set(those)) == 1 else pick(those, linear)
