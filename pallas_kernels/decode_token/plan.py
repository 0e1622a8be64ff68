"""How the work of one decoding step is cut: linears into tiles, rows of a batch into columns, contexts into splits.

Linears that share their input are a `Group`. The weights of each are cut into tiles of `TILE` rows, a tile into chunks of
`PIECE` columns, and the columns into `slices`. Thread block b computes slice b % slices of the tiles that are b // slices
modulo `members`, so it needs only its own slice of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE, HALF = 128, 64
"""Rows of a tile of weights, and of what the tensor cores multiply at once."""
PIECE = 64
"""Columns of a chunk [TILE, PIECE] of weights; ranks of an expert that are multiplied at once."""
SHARED_MEMORY = 227 * 1024
RESERVED = 6 * 1024
"""Of the shared memory: for barriers and for reductions."""
MAX_SLICES, MAX_SLOTS, MAX_INPUT = 16, 12, 48 * 1024
SPLIT_SLOTS = 512
"""Positions of the cache that one thread block reads at least."""


def num_tiles(out_dim: int) -> int:
    return -(-out_dim // TILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears W [out, in] of one input; those in `adapted` have experts."""

    names: tuple[str, ...]
    outs: tuple[int, ...]
    in_dim: int
    slices: int
    members: int
    adapted: tuple[str, ...]

    @property
    def chunks(self) -> int:
        return self.in_dim // PIECE

    @property
    def slice_chunks(self) -> int:
        """Chunks of the longest slice."""
        return -(-self.chunks // self.slices)

    @property
    def num_tiles(self) -> int:
        return sum(map(num_tiles, self.outs))

    def first_tile(self, name: str) -> int:
        return sum(map(num_tiles, self.outs[: self.names.index(name)]))


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
    def max_slices(self) -> int:
        return max(group.slices for group in self.groups)

    @property
    def h_shape(self) -> tuple[int, int]:
        """Linears that are finished together, and pieces of the experts' ranks."""
        return max(1, len(self.gate_up.adapted)), self.max_used * self.rank_pieces

    @property
    def x_chunks(self) -> int:
        return max(group.slice_chunks for group in self.groups)


def columns_for(batch: int) -> int:
    """N of a batch of at most 32 rows."""
    return next(n for n in (8, 16, 32) if n >= batch)


def max_in_dim(batch: int, itemsize: int = 2) -> int:
    """The widest input whose slices fit the shared memory."""
    return MAX_SLICES * (MAX_INPUT // (columns_for(batch) * itemsize) // PIECE * PIECE)


def make_group(
    shapes: dict[str, tuple[int, int]], adapted: tuple[str, ...], num_blocks: int, columns: int, itemsize: int
) -> Group:
    """The cut into the fewest slices whose longest share is within a twentieth of the shortest there is; a slice of the
    input takes at most `MAX_INPUT` bytes."""
    outs, in_dim = tuple(out for out, _ in shapes.values()), next(iter(shapes.values()))[1]
    tiles, chunks = sum(map(num_tiles, outs)), in_dim // PIECE
    shares = {}
    for slices in range(1, min(chunks, num_blocks, MAX_SLICES) + 1):
        length = -(-chunks // slices)
        if length * PIECE * columns * itemsize <= MAX_INPUT:
            shares[slices] = -(-tiles // (num_blocks // slices)) * length
    slices = next(s for s, share in shares.items() if share <= 1.05 * min(shares.values()))
    return Group(
        names=tuple(shapes), outs=outs, in_dim=in_dim, slices=slices, members=num_blocks // slices,
        adapted=tuple(name for name in shapes if name in adapted),
    )  # fmt: skip


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
    columns = columns_for(batch)

    def group(*names: str) -> Group:
        return make_group({name: shapes[name] for name in names}, adapted, num_blocks, columns, itemsize)

    units = batch * num_kv_heads
    splits = max(1, min(num_blocks // units, cache_slots // SPLIT_SLOTS, 16))
    parts = {
        "qkv": group("q_proj", "k_proj", "v_proj"), "o": group("o_proj"), "gate_up": group("gate_proj", "up_proj"),
        "down": group("down_proj"), "head": group("lm_head"),
    }  # fmt: skip
    x_bytes = max(part.slice_chunks for part in parts.values()) * PIECE * columns * itemsize
    pieces = -(-rank // PIECE)
    h_bytes = max(1, len(parts["gate_up"].adapted)) * max_used * pieces * PIECE * columns * itemsize
    q_bytes = HALF * (head_dim + TILE + PIECE) * itemsize
    left = SHARED_MEMORY - RESERVED - max(x_bytes, h_bytes, q_bytes)  # they are never used at the same time
    return Plan(
        **parts, columns=columns, num_blocks=num_blocks, splits=splits, max_used=max_used, rank_pieces=pieces,
        slots=min(MAX_SLOTS, left // (TILE * PIECE * itemsize)),
    )  # fmt: skip
