"""The static plan of a megakernel: every size that is fixed when it is compiled.

Linears that share their input are a `Group`. The weights of each are divided into tiles of `TILE_M` rows, a tile into chunks
[TILE_M, TILE_K], which is what a stage of the pipeline holds, and the chunks of a row of tiles into `split_k` slices. A
unit is the same tile of the linears that are computed together (gate and up). CTA b computes

    slice b % split_k of the units u with u ≡ b // split_k (mod cta_groups),

so it needs its own slice of the input only, and the `split_k` CTAs of a CTA group reduce the partial sums of its units.
Which CTA computes which tile is in `schedule`; here is how many there are of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels.megakernel.sizes import (
    MAX_SPLIT_K,
    MAX_WIDE_INPUT_BYTES,
    SMEM_BYTES,
    TILE_K,
    TILE_M,
    WGMMA_N,
    chunk_k_tiles,
    min_stages,
    padded,
    smem_rows,
    stages_beside,
)
from pallas_kernels.quantised import QuantLayout

ALL_REDUCED = "o_proj", "down_proj"
"""Linears whose outputs are partial sums where several devices share the model."""
MAX_A_SPLIT_K = 8
PREFERRED_INPUT_BYTES, MAX_INPUT_BYTES = 24 * 1024, 48 * 1024
"""Preferred and largest size of a slice of the input in shared memory, unless it is so wide that no slice is smaller."""
H_PIECE_BYTES = 32 * 1024
"""Size of the pieces in which h comes into shared memory where it does not fit as a whole. The stages of the pipeline take
the rest: while a piece is loaded, the copies in flight must last."""
COPIES_DURING_EXCHANGE = 2
"""Copies that a CTA has in flight at most while CTAs exchange partial sums: somewhat fewer than keep the memory busy."""
A_DEADLINE = 24
"""Chunks that a CTA still takes in a phase once it must have finished its tiles of A: so many are in the pipeline at
first, or come while CTAs exchange."""
PARTIAL_COST = {False: 0.17, True: 0.05}
"""Chunks, by `is_batch_one`, that come while a CTA adds one more partial sum of A x."""
MIN_SPLIT_SLOTS = 512
"""Cache slots that one CTA of attention reads at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A timeline of the launch by Mosaic GPU's profiler, written to `directory`: at most `events` begin and end in a
    warpgroup. They are collected in `smem_bytes` of shared memory, which the pipeline gives up."""

    directory: str
    events: int = 300
    smem_bytes: int = 16 * 1024


def num_tiles(out_dim: int) -> int:
    return -(-out_dim // TILE_M)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears W [out, in] of one input; those in `adapted` have experts."""

    passes: tuple[tuple[str, ...], ...]
    """Linears of equal shapes, whose tiles make the units, by pass."""
    outs: dict[str, int]
    in_dim: int
    split_k: int
    cta_groups: int
    adapted: tuple[str, ...]
    a_split_k: int
    """Parts of each slice of an expert's A; 0 if the group has no experts."""
    fused_attention: bool
    """The input is attention's context, and a slice of it one unit of attention, which each CTA of the slice computes
    itself."""
    underloaded_groups: int
    """CTA groups, the last ones, with one unit less than the others; 0 if all have as many."""
    a_tile_quota: int
    """Tiles of A that an underloaded CTA group takes before others take any."""
    reducer_ctas: int
    """CTAs, the last ones, that reduce the partial sums of A x, unless the batch is one row."""
    layout: QuantLayout | None = None
    """Layout of the linears' codes, if they are quantised."""
    first_semaphore: int = 0

    @property
    def chunk_k_tiles(self) -> int:
        """K-tiles of the input that a chunk of W is multiplied with."""
        return chunk_k_tiles(self.layout)

    @property
    def chunks(self) -> int:
        """Chunks of a row of tiles of W, over all slices of the input."""
        return self.in_dim // TILE_K // self.chunk_k_tiles

    @property
    def max_slice_chunks(self) -> int:
        """Chunks of W in the longest slice."""
        return -(-self.chunks // self.split_k)

    @property
    def max_slice_k_tiles(self) -> int:
        """K-tiles of the longest slice."""
        return self.max_slice_chunks * self.chunk_k_tiles

    @property
    def num_tiles(self) -> int:
        return sum(map(num_tiles, self.outs.values()))

    def first_tile(self, name: str) -> int:
        names = list(self.outs)
        return sum(num_tiles(self.outs[other]) for other in names[: names.index(name)])

    def units(self, names: tuple[str, ...]) -> int:
        """Units of a pass: the tiles of its first linear."""
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
    def a_partials(self) -> int:
        """Partial sums of A x."""
        return self.split_k * self.a_split_k

    @property
    def loaded_groups(self) -> int:
        """CTA groups that are not underloaded."""
        return self.cta_groups - self.underloaded_groups

    @property
    def all_reduced(self) -> bool:
        """True if the outputs are all-reduced over the devices, as those of `ALL_REDUCED`."""
        return set(self.outs) <= set(ALL_REDUCED)

    @property
    def num_semaphores(self) -> int:
        """One for A x, one for h, and one for each CTA group."""
        return 2 + self.cta_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is fixed when the kernel is compiled."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    head: Group
    padded_batch: int
    """N: rows of the batch, padded to what the tensor cores multiply."""
    is_batch_one: bool
    num_ctas: int
    context_splits: int
    """CTAs that share the context of one row and key-value head."""
    max_experts_used: int
    """U: distinct experts that the rows use together, at most."""
    rank_tiles: int
    """Tiles of `TILE_K` ranks, per expert."""
    h_rank_tiles: int
    """Rank tiles whose h is in shared memory at once: all, or a piece of them where they do not fit."""
    stages: int
    """Stages of the SMEM pipeline."""

    @property
    def layout(self) -> QuantLayout | None:
        """Layout of the codes of a layer's linears, if they are quantised; the head never is."""
        return self.qkv.layout

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down, self.head

    @property
    def layer_groups(self) -> tuple[Group, ...]:
        """Groups of a layer, in order."""
        return self.groups[:-1]

    @property
    def t_buffers(self) -> int:
        """Buffers for partial sums of A x. In a batch of one several CTAs read each, so groups use two in turn."""
        return 2 if self.is_batch_one else 1

    @property
    def max_rank_tiles(self) -> int:
        """Rank tiles of all experts in use, at most."""
        return self.max_experts_used * self.rank_tiles

    @property
    def x_smem_rows(self) -> int:
        return max(smem_rows(group.max_slice_k_tiles, self.padded_batch) for group in self.groups)

    @property
    def h_smem_rows(self) -> int:
        """Rows of shared memory for h, the right operand of the experts' B."""
        return h_smem_rows(self.groups, self.h_rank_tiles, self.padded_batch, self.is_batch_one)

    @property
    def num_semaphores(self) -> int:
        return sum(group.num_semaphores for group in self.groups)

    def tiles_by_partial(self) -> list[int]:
        """Largest number of tiles in a group of a layer that have partial sum i, for every i; for a batch of one, that have
        one of the `WGMMA_N` partial sums from i · WGMMA_N on."""
        step = WGMMA_N if self.is_batch_one else 1
        partials = [(group.num_tiles, group.split_k + bool(group.adapted)) for group in self.layer_groups]
        most = max(number for _, number in partials)
        return [max(tiles for tiles, number in partials if number > i) for i in range(0, most, step)]


def h_smem_rows(groups: Sequence[Group], rank_tiles: int, padded_batch: int, is_batch_one: bool) -> int:
    """Rows of `TILE_K` numbers that h takes: of a linear, or of a batch of one of all adapted linears of a group; without
    experts the least that there can be."""
    most = max(len(group.adapted) for group in groups)
    return smem_rows(rank_tiles * (most if is_batch_one else 1), padded_batch) if most else WGMMA_N


def no_smem_reason(max_experts_used: int, rank: int, batch: int) -> str:
    experts = f"{max_experts_used} experts of rank {rank}"
    return f"{experts} in use by {batch} rows do not fit the shared memory beside the weights"


def make_group(
    shapes: dict[str, tuple[int, int]],
    passes: tuple[tuple[str, ...], ...],
    adapted: tuple[str, ...],
    *,
    max_rank_tiles: int,
    num_ctas: int,
    padded_batch: int,
    is_batch_one: bool,
    itemsize: int,
    preferred_input_bytes: int = PREFERRED_INPUT_BYTES,
    attention_units: int = 0,
    layout: QuantLayout | None = None,
) -> Group:
    """The group with the least split_k whose busiest CTA is within a twentieth of the best there is, if possible with
    `preferred_input_bytes` of a slice of the input at most, else with `MAX_INPUT_BYTES`. Where neither is possible, the
    one with the smallest slices.

    `max_rank_tiles`: of all experts in use. `attention_units`: units of attention whose context is the input, if a CTA
    may compute one itself; it does if the busiest CTA gets no more than a quarter busier.
    """
    names = [name for names in passes for name in names]
    outs, in_dim = {name: shapes[name][0] for name in names}, shapes[names[0]][1]
    units, k_tiles = sum(num_tiles(outs[first]) for first, *_ in passes), in_dim // TILE_K
    chunks = k_tiles // chunk_k_tiles(layout)

    def busiest(split_k: int) -> int:
        return -(-units // (num_ctas // split_k)) * -(-chunks // split_k)

    def slice_bytes(split_k: int) -> int:
        return -(-chunks // split_k) * chunk_k_tiles(layout) * TILE_K * padded_batch * itemsize

    candidates = range(1, min(chunks, num_ctas, MAX_SPLIT_K) + 1)
    is_wide = all(slice_bytes(s) > MAX_INPUT_BYTES for s in candidates)
    limit = MAX_WIDE_INPUT_BYTES if is_wide else MAX_INPUT_BYTES
    costs = {s: busiest(s) for s in candidates if slice_bytes(s) <= limit}
    if not costs:
        raise ValueError(f"{names[0]} has {in_dim} columns: slices for {num_ctas} CTAs do not fit the shared memory")
    good = [s for s in costs if costs[s] <= 1.05 * min(costs.values())]
    small = [s for s in good if slice_bytes(s) <= preferred_input_bytes]
    fused_attention = 0 < attention_units <= num_ctas and chunks % attention_units == 0
    fused_attention = fused_attention and busiest(attention_units) <= 1.25 * min(costs.values())
    split_k = attention_units if fused_attention else (small or good)[-1 if is_wide else 0]
    cta_groups, adapted = num_ctas // split_k, tuple(name for name in names if name in adapted)
    underloaded = -units % cta_groups
    slice_chunks, pairs, loaded = (
        -(-chunks // split_k),
        len(adapted) * -(-max_rank_tiles // 2),
        cta_groups - underloaded,
    )
    unit_chunks, idle_ctas = len(passes[0]) * slice_chunks, num_ctas - loaded * split_k
    a_split_k, quota = (0, 0) if not adapted else _split_a(
        pairs, slice_chunks * chunk_k_tiles(layout), loaded, underloaded,
        max_split=min(MAX_A_SPLIT_K, chunks // split_k * chunk_k_tiles(layout)),
        limit=min(unit_chunks, -(-units // cta_groups) * unit_chunks - A_DEADLINE),
        partial_cost=split_k * PARTIAL_COST[is_batch_one],
    )  # fmt: skip
    return Group(
        passes=passes, outs=outs, in_dim=in_dim, split_k=split_k, cta_groups=cta_groups, adapted=adapted,
        a_split_k=a_split_k, fused_attention=fused_attention, underloaded_groups=underloaded, a_tile_quota=quota,
        reducer_ctas=idle_ctas if len(adapted) * max_rank_tiles * (padded_batch // WGMMA_N) <= idle_ctas else num_ctas,
        layout=layout,
    )  # fmt: skip


def _split_a(
    pairs: int, slice_k_tiles: int, loaded: int, underloaded: int, *, limit: int, max_split: int, partial_cost: float
) -> tuple[int, int]:
    """(a_split_k, a_tile_quota): the split with which the loaded CTA groups' tiles of so many pairs of rank tiles, and
    then the sum of the partials, take the shortest, when an underloaded group takes up to `limit` chunks."""
    costs = {}
    for split in range(1, max_split + 1):
        chunks = -(-slice_k_tiles // split)
        quota = max(0, limit) // chunks if underloaded else 0
        rest = -(-max(0, pairs * split - underloaded * quota) // loaded) * chunks
        costs[split] = rest + split * partial_cost, quota
    split = min(costs, key=lambda split: costs[split][0])
    return split, costs[split][1]


def make_plan(
    shapes: dict[str, tuple[int, int]],
    adapted: tuple[str, ...],
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    cache_slots: int,
    max_experts_used: int,
    rank: int,
    num_ctas: int,
    itemsize: int = 2,
    smem_bytes: int = SMEM_BYTES,
    layout: QuantLayout | None = None,
) -> Plan:
    """`shapes`: (out, in) of the seven linears and of `lm_head`. `smem_bytes`: that the kernel may use. `layout`: of the
    codes of the seven linears, if they are quantised."""
    padded_batch, rank_tiles = padded(batch), -(-rank // TILE_K)
    group_size = shapes["q_proj"][0] // (num_kv_heads * head_dim)
    passes: dict[str, tuple[tuple[str, ...], ...]] = {
        "qkv": (("q_proj",), ("k_proj",), ("v_proj",)), "o": (("o_proj",),), "gate_up": (("gate_proj", "up_proj"),),
        "down": (("down_proj",),), "head": (("lm_head",),),
    }  # fmt: skip

    units = batch * num_kv_heads * -(-group_size // WGMMA_N)
    splits = max(1, min(num_ctas // units, cache_slots // MIN_SPLIT_SLOTS, 16))
    equal_units = group_size <= WGMMA_N or group_size % WGMMA_N == 0  # all units of attention have as many queries
    attention_units = {"o": units if batch == splits == 1 and equal_units else 0}

    def make_groups(preferred_input_bytes: int) -> dict[str, Group]:
        options: dict[str, Any] = {"max_rank_tiles": max_experts_used * rank_tiles, "num_ctas": num_ctas}
        options |= {"padded_batch": padded_batch, "is_batch_one": batch == 1, "itemsize": itemsize}
        options |= {"preferred_input_bytes": preferred_input_bytes}
        return {
            name: make_group(
                shapes, own, adapted, attention_units=attention_units.get(name, 0),
                layout=None if name == "head" else layout, **options,
            )
            for name, own in passes.items()
        }  # fmt: skip

    groups = make_groups(PREFERRED_INPUT_BYTES)
    widest = max(group.max_slice_k_tiles for group in groups.values()) * TILE_K * padded_batch * itemsize
    if widest > PREFERRED_INPUT_BYTES:  # the others may use the room that one of them needs: a smaller split_k
        groups = make_groups(widest)
    first_semaphore = 0
    for name, group in groups.items():
        groups[name] = replace(group, first_semaphore=first_semaphore)
        first_semaphore += group.num_semaphores
    plan = Plan(
        **groups, padded_batch=padded_batch, is_batch_one=batch == 1, num_ctas=num_ctas,
        max_experts_used=max_experts_used, rank_tiles=rank_tiles, h_rank_tiles=max_experts_used * rank_tiles, stages=0,
        context_splits=splits,
    )  # fmt: skip
    attention_rows = (head_dim // TILE_K + TILE_M // TILE_K) * WGMMA_N  # they and those of linears are used in turn

    def with_stages(plan: Plan) -> Plan:
        rows = max(plan.x_smem_rows + plan.h_smem_rows, attention_rows)
        return replace(plan, stages=stages_beside(rows, itemsize, smem_bytes, layout))

    whole = with_stages(plan)
    if whole.stages >= min_stages(head_dim) or batch == 1:
        return whole
    piece = max(1, H_PIECE_BYTES // (padded_batch * TILE_K * itemsize))
    return with_stages(replace(plan, h_rank_tiles=min(piece, plan.max_rank_tiles)))
