"""Which thread block does what of a group of linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.decode_token.plan import QUERIES, Group, Plan


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
    """[B]: where the rows' tokens are; none where that does not matter."""

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


def divmod_(n, step):
    return (n, 0) if isinstance(step, int) and step == 1 else (n // step, n % step)


class Shares:
    """What is the share of one block, which takes one slice of the units of one member. Numbers are traced."""

    def __init__(self, group: Group, plan: Plan, scalars: Scalars, block: Any):
        self.group, self.plan, self.scalars, self.block = group, plan, scalars, block
        self.slice, self.member = block % group.slices, block // group.slices
        self.first_chunk = self.slice * group.chunks // group.slices
        self.num_chunks = (self.slice + 1) * group.chunks // group.slices - self.first_chunk

    @property
    def used_pieces(self):
        return self.scalars.num_used * self.plan.rank_pieces

    def a_shares(self):
        """By adapted linear: (its place, its name, how many products are this block's, the n-th one's pair of pieces and
        part). Light members take their quota first, and the others the rest, from the last one on."""
        group = self.group
        heavy, quota = group.heavy, group.light * group.quota
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
        return (self.used_pieces + 1) // 2 * self.group.a_parts

    def a_blocks(self):
        """How many blocks have products of A."""
        group, number = self.group, len(self.group.adapted) * self._a_products_each
        light = jnp.minimum(number, group.light if group.quota else 0)
        others = jnp.clip(number - group.light * group.quota, 0, group.heavy)
        return group.slices * (light + others)

    def chunks_of(self, part):
        """(first chunk, how many) of a part of this block's slice."""
        low, high = (self.num_chunks * i // self.group.a_parts for i in (part, part + 1))
        return self.first_chunk + low, high - low

    def units(self, names):
        """(how many units of a pass are this block's, the n-th one's tile)."""
        group = self.group
        first, number = share(group.first_unit(names), group.units(names), self.member, group.members)
        number = jnp.where(self.member < group.members, number, 0)

        def tile(n):
            return first + n * group.members

        return number, tile

    @property
    def narrow(self):
        """Pieces of `QUERIES` columns that a tile's columns are."""
        return self.plan.columns // QUERIES

    def finish_share(self, place, names):
        """(how many narrow pieces of a pass's tiles this block finishes, the n-th one's tile, half, and place there): the
        blocks of a member share those of its units."""
        units, tile = self.units(names)
        each = 2 * self.narrow
        first, number = share(place * units * each, units * each, self.slice, self.group.slices)

        def at(n):
            unit, piece = divmod_(first + n * self.group.slices, each)
            half, i = divmod_(piece, self.narrow)
            return tile(unit), half, i

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

    def b_shares(self):
        """By adapted linear: (its place, its name, how many of its tiles are this block's, the n-th one): the blocks of a
        member share those of its units."""
        for names in self.group.passes:
            units, tile = self.units(names)
            for name in names:
                if name in self.group.adapted:
                    place = self.group.adapted.index(name)
                    first, number = share(place * units, units, self.slice, self.group.slices)

                    def at(n, first=first, tile=tile):
                        return tile(first + n * self.group.slices)

                    yield place, name, number, at

    def order(self, names, n, number):
        """Of the n-th of a block's `number` units of a pass: (of each name, how many chunks of W come first and how many
        last; whether B comes between those, or None if it never does). Without a unit of the last pass there is B alone."""
        last = self.has_b(names)
        chunks = jnp.where(number > 0, self.num_chunks, 0) if last else self.num_chunks
        split = chunks // 2 if last else chunks
        yield from ((name, chunks, 0, None) for name in names[:-1])
        yield names[-1], split, chunks - split, n + 1 >= number if last else None

    def rounds(self, names, number):
        """How many units `order` tells of."""
        return jnp.maximum(number, 1) if self.has_b(names) else number

    def has_b(self, names):
        return bool(self.group.adapted) and names == self.group.passes[-1]
