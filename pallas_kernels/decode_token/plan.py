"""How the work of one decoding step is cut: linears into tiles, rows of a batch into columns, contexts into splits.

Linears that share their input are a `Group`. The weights of each are cut into tiles of `TILE` rows, a tile into chunks of
`PIECE` columns, and the columns into `slices`. A unit is the same tile of the linears that are finished together. Thread
block b computes slice b % slices of the units that are b // slices modulo `members`, so it needs only its own slice of the
input; the `slices` blocks of a unit share what is to do with their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

TILE, HALF = 128, 64
"""Rows of a tile of weights, and of what the tensor cores multiply at once."""
PIECE = 64
"""Columns of a chunk [TILE, PIECE] of weights; ranks of an expert that are multiplied at once."""
SHARED_MEMORY = 227 * 1024
RESERVED = 3 * 1024
"""Of the shared memory: for barriers and for reductions."""
ADDED_UP = "o_proj", "down_proj"
"""Linears whose outputs devices that share the model have in parts."""
QUERIES = 8
"""Columns that the tensor cores multiply at least: query heads of one key that attention takes together."""
MAX_SLICES, MAX_SLOTS, SMALL_INPUT, MAX_INPUT, MAX_A_PARTS = 16, 13, 24 * 1024, 48 * 1024, 8
MIN_SLOTS = 2
"""Of the ring: a chunk is released when the next one has come. Attention takes all parts of a tile together."""
QUIET = 2
"""Chunks that a thread block has under way at once, at most, while blocks exchange what they have found: somewhat fewer than
keep the memory busy."""
LATE = 24
"""Chunks that a block takes in a phase after it must have done its products of A: so many are in the ring at first, or come
while blocks exchange."""
PART_COST = {False: 0.17, True: 0.05}
"""By whether the batch is a single row: how many chunks come while a block adds one more part of A x up."""
SPLIT_SLOTS = 512
"""Positions of the cache that one thread block reads at least."""


def div(n: Any, d: Any) -> Any:
    """⌊n / d⌋ of what is not negative, as all numbers in the kernels: `//` would ask for the sign first, as `%` would, which
    takes a third of the time to compile."""
    return n // d if isinstance(n, int) and isinstance(d, int) else lax.div(n, jnp.int32(d))


def rem(n: Any, d: Any) -> Any:
    """n modulo d, of what is not negative."""
    return n % d if isinstance(n, int) and isinstance(d, int) else lax.rem(n, jnp.int32(d))


def num_tiles(out_dim: int) -> int:
    return -(-out_dim // TILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears W [out, in] of one input; those in `adapted` have experts."""

    passes: tuple[tuple[str, ...], ...]
    """The linears of a pass have equal shapes and are finished together."""
    outs: dict[str, int]
    in_dim: int
    slices: int
    members: int
    adapted: tuple[str, ...]
    a_parts: int
    """Of each slice of an expert's A; 0 if the group has no experts."""
    attended: bool
    """Whether its input is attention's context, a slice of it a unit of attention to which each block attends itself."""
    light: int
    """Members, the last ones, that have one unit less than the others; 0 if all have as many."""
    quota: int
    """Products of A that a light member takes before others take any."""
    gatherers: int
    """Blocks, the last ones, that add up the products of A, if the batch is not a single row."""
    first_semaphore: int = 0

    @property
    def chunks(self) -> int:
        return self.in_dim // PIECE

    @property
    def slice_chunks(self) -> int:
        """Chunks of the longest slice."""
        return -(-self.chunks // self.slices)

    @property
    def num_tiles(self) -> int:
        return sum(map(num_tiles, self.outs.values()))

    def first_tile(self, name: str) -> int:
        names = list(self.outs)
        return sum(num_tiles(self.outs[other]) for other in names[: names.index(name)])

    def units(self, names: tuple[str, ...]) -> int:
        """Of a pass."""
        return num_tiles(self.outs[names[0]])

    @property
    def num_units(self) -> int:
        return sum(map(self.units, self.passes))

    @property
    def width(self) -> int:
        """Linears of a pass."""
        return len(self.passes[0])

    def first_unit(self, names: tuple[str, ...]) -> int:
        return sum(map(self.units, self.passes[: self.passes.index(names)]))

    @property
    def a_sum(self) -> int:
        """Parts of A x."""
        return self.slices * self.a_parts

    @property
    def heavy(self) -> int:
        """Members that are not light."""
        return self.members - self.light

    @property
    def added_up(self) -> bool:
        """Whether it is one of `ADDED_UP`."""
        return set(self.outs) <= set(ADDED_UP)

    @property
    def num_semaphores(self) -> int:
        """One for A, one for h, and one for each member."""
        return 2 + self.members


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is fixed when the kernel is compiled."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    head: Group
    columns: int
    """N: rows of the batch, padded to what the tensor cores multiply."""
    single: bool
    """Whether the batch is one row."""
    num_blocks: int
    splits: int
    """Thread blocks that share the context of one row and key-value head."""
    max_used: int
    """U: distinct experts that the rows use together, at most."""
    rank_pieces: int
    """Of `PIECE` ranks, per expert."""
    slots: int
    """Of the ring of chunks in shared memory."""

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down, self.head

    @property
    def pieces(self) -> int:
        """Of the ranks of all experts in use, at most."""
        return self.max_used * self.rank_pieces

    @property
    def x_rows(self) -> int:
        return max(input_rows(group.slice_chunks, self.columns) for group in self.groups)

    @property
    def h_rows(self) -> int:
        """Of the experts' right operand."""
        return expert_rows(self.groups, self.pieces, self.columns, self.single)

    @property
    def num_semaphores(self) -> int:
        return sum(group.num_semaphores for group in self.groups)

    def tiles_by_part(self) -> list[int]:
        """How many tiles of a layer's linears have, at the same place, a part of that number, or of a single row parts of
        those `QUERIES` numbers."""
        step, layer = QUERIES if self.single else 1, self.groups[:-1]
        parts = [(group.num_tiles, group.slices + bool(group.adapted)) for group in layer]
        most = max(number for _, number in parts)
        return [max(tiles for tiles, number in parts if number > i) for i in range(0, most, step)]


def columns_for(batch: int) -> int:
    """N of a batch of at most 32 rows."""
    return next(n for n in (8, 16, 32) if n >= batch)


def input_rows(chunks: int, columns: int) -> int:
    """Rows of `PIECE` numbers that a slice of the input takes, as they are loaded: `HALF` at once."""
    return -(-chunks * columns // HALF) * HALF


def expert_rows(groups: Sequence[Group], pieces: int, columns: int, single: bool) -> int:
    """Rows of `PIECE` numbers that h takes, as they are loaded: of a linear, or of a single row of all adapted linears of a
    group; without experts what is the least."""
    most = max(len(group.adapted) for group in groups)
    return input_rows(pieces * (most if single else 1), columns) if most else QUERIES


def slots_beside(rows: int, itemsize: int) -> int:
    """Of the ring, that the shared memory has room for beside operands of so many rows."""
    return min(MAX_SLOTS, (SHARED_MEMORY - RESERVED - rows * PIECE * itemsize) // (TILE * PIECE * itemsize))


def in_pieces(x: Float[Array, "N D"]) -> Float[Array, "R P"]:
    """Activations as the kernel reads them: [D / PIECE · N, PIECE], the rows' piece 0, then their piece 1 …, and `HALF` rows
    more."""
    return jnp.pad(x.reshape(len(x), -1, PIECE).swapaxes(0, 1).reshape(-1, PIECE), ((0, HALF), (0, 0)))


def no_room(max_used: int, rank: int, batch: int) -> str:
    return f"{max_used} experts of rank {rank} in use by {batch} rows do not fit the shared memory beside the weights"


def max_in_dim(batch: int, itemsize: int = 2) -> int:
    """The widest input whose slices fit the shared memory."""
    return MAX_SLICES * (MAX_INPUT // (columns_for(batch) * itemsize) // PIECE * PIECE)


def make_group(
    shapes: dict[str, tuple[int, int]],
    passes: tuple[tuple[str, ...], ...],
    adapted: tuple[str, ...],
    *,
    pieces: int,
    num_blocks: int,
    columns: int,
    single: bool,
    itemsize: int,
    small_input: int = SMALL_INPUT,
    heads: int = 0,
) -> Group:
    """The cut into the fewest slices whose longest share is within a twentieth of the shortest there is, if possible with
    `small_input` bytes of a slice of the input at most, and with `MAX_INPUT` at any rate. `pieces`: of the ranks of all
    experts in use. `heads`: units of attention whose context is the input, if a block may attend to one itself; it does if
    that makes the longest share no more than a quarter longer."""
    names = [name for names in passes for name in names]
    outs, in_dim = {name: shapes[name][0] for name in names}, shapes[names[0]][1]
    units, chunks = sum(num_tiles(outs[first]) for first, *_ in passes), in_dim // PIECE

    def share(slices: int) -> int:
        return -(-units // (num_blocks // slices)) * -(-chunks // slices)

    counts = range(1, min(chunks, num_blocks, MAX_SLICES) + 1)
    shares = {s: share(s) for s in counts if -(-chunks // s) * PIECE * columns * itemsize <= MAX_INPUT}
    if not shares:
        raise ValueError(
            f"{names[0]} has {in_dim} columns: slices for {num_blocks} thread blocks do not fit the shared memory"
        )
    good = [s for s in shares if shares[s] <= 1.05 * min(shares.values())]
    small = [s for s in good if -(-chunks // s) * PIECE * columns * itemsize <= small_input]
    attended = 0 < heads <= num_blocks and share(heads) <= 1.25 * min(shares.values())
    slices = heads if attended else (small or good)[0]
    members, adapted = num_blocks // slices, tuple(name for name in names if name in adapted)
    light = -units % members
    slice_chunks, pairs, others = -(-chunks // slices), len(adapted) * -(-pieces // 2), members - light
    unit_chunks, idle = len(passes[0]) * slice_chunks, num_blocks - others * slices
    a_parts, quota = (0, 0) if not adapted else _cut_a(
        pairs, slice_chunks, others, light, max_parts=min(MAX_A_PARTS, chunks // slices),
        limit=min(unit_chunks, -(-units // members) * unit_chunks - LATE), part_cost=slices * PART_COST[single],
    )  # fmt: skip
    return Group(
        passes=passes, outs=outs, in_dim=in_dim, slices=slices, members=members, adapted=adapted, a_parts=a_parts,
        attended=attended, light=light, quota=quota,
        gatherers=idle if len(adapted) * pieces * (columns // QUERIES) <= idle else num_blocks,
    )  # fmt: skip


def _cut_a(
    pairs: int, slice_chunks: int, heavy: int, light: int, *, limit: int, max_parts: int, part_cost: float
) -> tuple[int, int]:
    """(parts of a slice of A, products that a light member takes): the parts with which the others' share of the products of
    so many pairs, and then the sum of the parts, take the shortest, when light members take up to `limit` chunks."""
    costs = {}
    for parts in range(1, max_parts + 1):
        chunks = -(-slice_chunks // parts)
        quota = max(0, limit) // chunks if light else 0
        share = -(-max(0, pairs * parts - light * quota) // heavy) * chunks
        costs[parts] = share + parts * part_cost, quota
    parts = min(costs, key=lambda parts: costs[parts][0])
    return parts, costs[parts][1]


def make_plan(
    shapes: dict[str, tuple[int, int]],
    adapted: tuple[str, ...],
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    cache_slots: int,
    max_used: int,
    rank: int,
    num_blocks: int,
    itemsize: int = 2,
) -> Plan:
    """`shapes`: (out, in) of the seven linears and of `lm_head`."""
    columns, rank_pieces = columns_for(batch), -(-rank // PIECE)
    group_size = shapes["q_proj"][0] // (num_kv_heads * head_dim)
    passes: dict[str, tuple[tuple[str, ...], ...]] = {
        "qkv": (("q_proj",), ("k_proj",), ("v_proj",)), "o": (("o_proj",),), "gate_up": (("gate_proj", "up_proj"),),
        "down": (("down_proj",),), "head": (("lm_head",),),
    }  # fmt: skip

    units = batch * num_kv_heads * -(-group_size // QUERIES)
    splits = max(1, min(num_blocks // units, cache_slots // SPLIT_SLOTS, 16))
    full = group_size <= QUERIES or group_size % QUERIES == 0  # all units of attention have as many queries
    heads = {"o": units if batch == splits == 1 and full else 0}

    def cut(small_input: int) -> dict[str, Group]:
        options: dict[str, Any] = {"pieces": max_used * rank_pieces, "num_blocks": num_blocks, "columns": columns}
        options |= {"single": batch == 1, "itemsize": itemsize, "small_input": small_input}
        return {
            name: make_group(shapes, own, adapted, heads=heads.get(name, 0), **options) for name, own in passes.items()
        }

    parts = cut(SMALL_INPUT)
    widest = max(group.slice_chunks for group in parts.values()) * PIECE * columns * itemsize
    if widest > SMALL_INPUT:  # the others may use the room that one of them needs: fewer slices, fewer sums
        parts = cut(widest)
    first_semaphore = 0
    for name, group in parts.items():
        parts[name] = replace(group, first_semaphore=first_semaphore)
        first_semaphore += group.num_semaphores
    plan = Plan(
        **parts, columns=columns, single=batch == 1, num_blocks=num_blocks, max_used=max_used, rank_pieces=rank_pieces,
        slots=0, splits=splits,
    )  # fmt: skip
    linear_rows = plan.x_rows + plan.h_rows
    attention_rows = (head_dim // PIECE + TILE // PIECE) * QUERIES  # the two are never used at the same time
    return replace(plan, slots=slots_beside(max(linear_rows, attention_rows), itemsize))


def exchanged(groups: Sequence[Group], plan: Any, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape, dtype)} of what the blocks leave each other in device memory. The parts of a sum, [HALF, N] each, are
    narrow pieces, or of a single row the columns of such pieces: [parts or tiles of them, …, pieces, HALF, QUERIES]."""
    slices, targets = max(group.slices for group in groups), max(len(group.adapted) for group in groups)

    def of_parts(parts, *what):
        if plan.single:
            return (-(-parts // QUERIES), *what, 1, HALF, QUERIES), jnp.float32
        return (parts, *what, plan.columns // QUERIES, HALF, QUERIES), jnp.float32

    buffers = {"y_part": of_parts(slices + bool(targets), max(group.num_tiles for group in groups), 2)}
    if targets:
        parts = max(group.a_sum for group in groups)
        buffers["t_part"] = of_parts(parts, targets, plan.pieces + plan.pieces % 2)
    if targets and not plan.single:
        buffers["h"] = ((targets * plan.pieces * plan.columns + HALF, PIECE), dtype)
    return buffers
