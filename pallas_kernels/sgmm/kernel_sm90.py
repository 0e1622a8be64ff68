"""SGMM on Hopper in one kernel launch: copies by TMA, products by wgmma, the two overlapped by three warpgroups.

Every linear of every layer is divided into strips of `TILE_M` rows, and a strip into tiles of `tile_n` columns. One thread
block runs on each multiprocessor and goes over its tiles:

    total = base[tile]                                              fp32, in registers
    for j in terms:  total = c_j · (total / c_j + B[e_j, rows] @ A[e_j, :, columns])
    W[tile] = total                                                 rounded once, from the buffer in which the base came

The tensor cores add each product to the sum itself, which is scaled before (one multiplication by c_{j-1} / c_j).
The producer warpgroup only issues copies, as far ahead as three multi-stage SMEM pipelines allow: of base tiles, of slabs of
A and of slabs of B, each slab a part of one expert's rank. The two consumer warpgroups compute 64 rows each. The slabs of B
stay for a whole strip where their pipeline has a stage for each. Blocks walk the strips together, so that the L2 cache
serves A to all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.sgmm.terms import Terms

GROUPS, ROWS = 2, 64  # warpgroups that compute, and the rows of a tile that each takes
TILE_M = GROUPS * ROWS
SHARED_MEMORY = 227 * 1024
NEGLIGIBLE = 2.0**-64  # coefficients below count as 0, so that the sum over one of them is finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Tiles of `TILE_M` rows and `tile_n` columns; slabs of `depth` of an expert's rank; stages of their SMEM pipelines.

    `keep_b`: the slabs of B stay for a strip, which takes a stage for each; otherwise they are copied again for every tile.
    `split` units divide a strip among them: its tiles go to them in turn.
    """

    tile_n: int
    depth: int
    split: int
    keep_b: bool
    w_stages: int
    a_stages: int
    b_stages: int

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of a block's pipelines and barriers."""
        columns = self.w_stages * TILE_M + self.a_stages * self.depth
        return (columns * self.tile_n + self.b_stages * TILE_M * self.depth) * itemsize + 2048


def configure(num_terms: int, rank: int, itemsize: int) -> Config:
    """The best configuration that fits: on an H200 three base tiles, B for a whole strip, four to eight slabs of A."""
    depth = max(d for d in (16, 32, 48, 64) if rank % d == 0)
    num_slabs, pair = num_terms * rank // depth, 2 * rank // depth
    for tile_n, w_stages in ((128, 3), (64, 3), (64, 2)):
        for keep_b, a_stages in ((True, max(4, pair)), (False, max(4, pair)), (False, pair)):
            config = Config(
                tile_n=tile_n, depth=depth, split=2 if num_slabs <= 2 else 1, keep_b=keep_b,
                w_stages=w_stages, a_stages=a_stages, b_stages=num_slabs if keep_b else a_stages,
            )  # fmt: skip
            if config.shared_memory(itemsize) <= SHARED_MEMORY:
                spare = (SHARED_MEMORY - config.shared_memory(itemsize)) // (depth * tile_n * itemsize)
                more = min(8 - a_stages, spare if keep_b else spare // 2) if depth < 64 and a_stages < 8 else 0
                return replace(config, a_stages=a_stages + more, b_stages=config.b_stages + (0 if keep_b else more))
    raise ValueError(f"sgmm cannot run as pallas: slabs of rank {rank} do not fit the shared memory")


def unsupported_reason(weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    """The reason why the kernel does not support these shapes, or None."""
    for name, w in weights.items():
        rank = a[name].shape[2]
        if w.dtype.itemsize != 2:
            return f"{name} is {w.dtype}, and the tensor cores multiply bfloat16 and float16"
        if w.shape[1] % 8 or w.shape[2] % 16:
            return f"{name} is [{w.shape[1]}, {w.shape[2]}], and copies need multiples of 8 and 16"
        if rank > 256:
            return f"rank {rank} is above 256, and the shared memory must hold the slabs of A of two products"
    return None


def _kernel(
    experts_gmem,  # [J] ids; those that count come first
    factors_gmem,  # [J + 1]: 1 / c_1, c_1 / c_2, …, c_J
    num_terms_gmem,  # [1] how many count
    *refs,  # of every target: W, A, B and, unless that is W itself, the base
    w_smem,  # [w_stages, TILE_M, tile_n]
    a_smem,  # [a_stages, depth, tile_n]
    b_smem,  # [b_stages, TILE_M, depth]
    w_full, w_empty, a_full, a_empty, b_full, b_empty,
    refs_per_target, config, multiply_onto,
):  # fmt: skip
    tile_n, depth = config.tile_n, config.depth
    segments = [refs[i : i + refs_per_target] for i in range(0, len(refs), refs_per_target)]
    slabs_per_term = segments[0][1].shape[2] // depth  # slabs of one product
    group, num_terms = lax.axis_index("group"), num_terms_gmem[0]
    num_slabs = num_terms * slabs_per_term
    start = jnp.int32(0), jnp.int32(0), jnp.int32(0)  # tiles, slabs of A and slabs of B passed through the pipelines

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def fill(count, source_gmem, stages_smem, full, empty):
            num_stages = stages_smem.shape[0]
            stage = count % num_stages

            @pl.when(count >= num_stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

            plgpu.copy_gmem_to_smem(source_gmem, stages_smem.at[stage], full.at[stage])
            return count + 1

        counts = start
        for w_gmem, a_gmem, b_gmem, *pristine_gmem in segments:
            base_gmem = pristine_gmem[0] if pristine_gmem else w_gmem

            def fill_b(layer, row, slab, slabs_b, b_gmem=b_gmem):
                expert, ranks = experts_gmem[slab // slabs_per_term], pl.ds(slab % slabs_per_term * depth, depth)
                return fill(slabs_b, b_gmem.at[layer, expert, pl.ds(row, TILE_M), ranks], b_smem, b_full, b_empty)

            def begin(layer, row, counts, fill_b=fill_b):
                tiles, slabs_a, slabs_b = counts
                if config.keep_b:
                    slabs_b = lax.fori_loop(0, num_slabs, partial(fill_b, layer, row), slabs_b)
                return tiles, slabs_a, slabs_b

            def visit(layer, row, column, counts, base_gmem=base_gmem, a_gmem=a_gmem, fill_b=fill_b):
                tiles, slabs_a, slabs_b = counts
                columns = pl.ds(column, tile_n)
                tiles = fill(tiles, base_gmem.at[layer, pl.ds(row, TILE_M), columns], w_smem, w_full, w_empty)

                def fill_slabs(slab, counts):
                    slabs_a, slabs_b = counts
                    expert, ranks = experts_gmem[slab // slabs_per_term], pl.ds(slab % slabs_per_term * depth, depth)
                    slabs_a = fill(slabs_a, a_gmem.at[layer, expert, ranks, columns], a_smem, a_full, a_empty)
                    return slabs_a, slabs_b if config.keep_b else fill_b(layer, row, slab, slabs_b)

                return tiles, *lax.fori_loop(0, num_slabs, fill_slabs, (slabs_a, slabs_b))

            counts = _walk(base_gmem.shape, config, begin, visit, lambda counts: counts, counts)

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        rows, first_factor = pl.ds(group * ROWS, ROWS), factors_gmem[0]

        def wait(full, count):
            stage = count % full.shape[0]
            plgpu.barrier_wait(full.at[stage])
            return stage

        def release(empty, count):
            plgpu.barrier_arrive(empty.at[count % empty.shape[0]])

        def begin(layer, row, counts):
            if config.keep_b:
                pl.loop(0, num_slabs)(lambda slab: plgpu.barrier_wait(b_full.at[(counts[2] + slab) % config.b_stages]))
            return counts

        def end(counts):
            tiles, slabs_a, slabs_b = counts
            if not config.keep_b:
                return counts
            pl.loop(0, num_slabs)(lambda slab: release(b_empty, slabs_b + slab))
            return tiles, slabs_a, slabs_b + num_slabs

        counts = start
        for w_gmem, *_ in segments:

            def visit(layer, row, column, counts, w_gmem=w_gmem):
                tiles, slabs_a, slabs_b = counts

                def add(j, carry):
                    total, factor = carry
                    next_factor = factors_gmem[j + 1]  # on its way while the tensor cores work

                    def products(acc):
                        for slab in (j * slabs_per_term + i for i in range(slabs_per_term)):
                            stage_a = wait(a_full, slabs_a + slab)
                            stage_b = (
                                (slabs_b + slab) % config.b_stages if config.keep_b else wait(b_full, slabs_b + slab)
                            )
                            plgpu.wgmma(acc, b_smem.at[stage_b, rows], a_smem.at[stage_a])

                    total = multiply_onto(total * factor, products)
                    for slab in (j * slabs_per_term + i for i in range(slabs_per_term)):
                        release(a_empty, slabs_a + slab)
                        if not config.keep_b:
                            release(b_empty, slabs_b + slab)
                    return total, next_factor

                stage = wait(w_full, tiles)
                base = w_smem[stage, rows].astype(jnp.float32)
                total, factor = lax.fori_loop(0, num_terms, add, (base, first_factor))
                w_smem[stage, rows] = (total * factor).astype(w_smem.dtype)
                plgpu.commit_smem()
                tile = w_gmem.at[layer, pl.ds(row + group * ROWS, ROWS), pl.ds(column, tile_n)]
                plgpu.copy_smem_to_gmem(w_smem.at[stage, rows], tile)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)

                @pl.when(tiles > 0)  # the tile before this one has left its stage
                def _():
                    release(w_empty, tiles - 1)

                return tiles + 1, slabs_a + num_slabs, slabs_b if config.keep_b else slabs_b + num_slabs

            counts = _walk(w_gmem.shape, config, begin, visit, end, counts)
        plgpu.wait_smem_to_gmem(0)


def _multiply_onto(total, products):
    """The tensor cores' sum of `total` and of what `products(accumulator)` multiplies."""
    return pl.run_state(products)(plgpu.ACC.init(total))


def _multiply_onto_interpreted(total, products):
    """The interpreter only knows accumulators that start with 0."""

    def of_zero(accumulator):
        products(accumulator)
        return accumulator[...]

    return total + pl.run_scoped(of_zero, plgpu.ACC(total.shape, total.dtype))


def _walk(shape, config, begin, visit, end, carry):
    """Go over this block's tiles of one linear, W [L, out, in].

    A strip's tiles go to `split` units in turn. Whole units first, one per block and wave; then this block's share,
    [low, high), of the tiles of the units that do not fill a wave, which touches two units at most.

    begin(layer, row, carry) → carry before a unit's tiles, visit(layer, row, column, carry) → carry for each,
    end(carry) → carry after them.
    """
    num_layers, out_dim, in_dim = shape
    block, num_blocks = lax.axis_index("block"), lax.axis_size("block")
    strips_per_layer, tiles = pl.cdiv(out_dim, TILE_M), pl.cdiv(pl.cdiv(in_dim, config.tile_n), config.split)
    num_units = num_layers * strips_per_layer * config.split
    waves, rest = divmod(num_units, num_blocks)
    first, last = rest * tiles * block // num_blocks, rest * tiles * (block + 1) // num_blocks

    def visit_unit(p, carry):
        whole = p < waves
        offset = (first // tiles + p - waves) * tiles
        unit = jnp.where(whole, p * num_blocks + block, waves * num_blocks + offset // tiles)
        low = jnp.where(whole, 0, jnp.maximum(first - offset, 0))
        high = jnp.where(whole, tiles, jnp.minimum(last - offset, tiles))
        strip, turn = jnp.minimum(unit, num_units - 1) // config.split, unit % config.split
        layer, row = strip // strips_per_layer, strip % strips_per_layer * TILE_M

        def tile(i, carry):
            return visit(layer, row, (i * config.split + turn) * config.tile_n, carry)

        return end(lax.fori_loop(low, high, tile, begin(layer, row, carry)))

    return lax.fori_loop(0, waves + 2 * (rest > 0), visit_unit, carry)


def _factors(terms: Terms) -> tuple[Array, Array, Array]:
    """The ids of the experts that count, first ones first; the factors of the sum before each of their products and after
    the last; their number, [1]. No sort, so that all of it is one small program."""
    counts = ~(abs(terms.coefficients) < NEGLIGIBLE)
    slots = jnp.arange(len(counts))
    places = counts & (jnp.sum(counts & (slots < slots[:, None]), axis=1) == slots[:, None])  # [to, from]
    experts = jnp.sum(jnp.where(places, terms.experts, 0), axis=1, dtype=jnp.int32)
    coefficients = jnp.sum(jnp.where(places, terms.coefficients, 0), axis=1) + ~places.any(axis=1)
    factors = jnp.pad(coefficients, (1, 0), constant_values=1) / jnp.pad(coefficients, (0, 1), constant_values=1)
    return experts, factors, jnp.sum(counts, dtype=jnp.int32)[None]


def sgmm_sm90(
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    terms: Terms,
    pristine: dict[str, Array] | None,
    *,
    interpret: Any = False,
    num_blocks: int | None = None,
    config: Config | None = None,
) -> dict[str, Array]:
    """See `pallas_kernels.sgmm.sgmm`. `num_blocks` thread blocks run (default: one on each multiprocessor); `interpret`:
    `plgpu.InterpretGPUParams()` on the CPU.

    Ranks that are no multiple of 16 are padded, which copies A and B. Raises `ValueError` with an `unsupported_reason`.
    """
    reason = unsupported_reason(weights, a)
    if reason is not None:
        raise ValueError(f"sgmm cannot run as pallas: {reason}")
    names = sorted(weights)
    dtype, padding = weights[names[0]].dtype, -a[names[0]].shape[2] % 16
    if padding:
        a = {name: jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for name, x in a.items()}
        b = {name: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) for name, x in b.items()}
    rank = a[names[0]].shape[2]
    config = config or configure(len(terms.experts), rank, dtype.itemsize)

    def pipeline_smem(num_stages, rows, columns, swizzled):
        swizzle = plgpu.find_swizzle(swizzled * dtype.itemsize * 8)
        tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))  # type: ignore[abstract]
        transforms = tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
        return plgpu.SMEM((num_stages, rows, columns), dtype, transforms=transforms)

    columns = math.gcd(config.tile_n, *(w.shape[2] for w in weights.values()))
    operand = math.gcd(columns, config.depth)  # wgmma wants one swizzle for both operands
    merged = {name: jax.new_ref(weights[name]) for name in names}
    refs = [x for n in names for x in (merged[n], a[n], b[n], *([] if pristine is None else [pristine[n]]))]
    kernel = plgpu.kernel(
        partial(
            _kernel,
            refs_per_target=len(refs) // len(names),
            config=config,
            multiply_onto=_multiply_onto_interpreted if interpret else _multiply_onto,
        ),
        out_type=(),
        grid=(num_blocks or jax.devices()[0].core_count,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types={
            "w_smem": pipeline_smem(config.w_stages, TILE_M, config.tile_n, columns),
            "a_smem": pipeline_smem(config.a_stages, config.depth, config.tile_n, operand),
            "b_smem": pipeline_smem(config.b_stages, TILE_M, config.depth, operand),
            "w_full": plgpu.Barrier(num_barriers=config.w_stages),
            "w_empty": plgpu.Barrier(num_barriers=config.w_stages, num_arrivals=GROUPS),
            "a_full": plgpu.Barrier(num_barriers=config.a_stages),
            "a_empty": plgpu.Barrier(num_barriers=config.a_stages, num_arrivals=GROUPS),
            "b_full": plgpu.Barrier(num_barriers=config.b_stages),
            "b_empty": plgpu.Barrier(num_barriers=config.b_stages, num_arrivals=GROUPS),
        },
        interpret=interpret,
    )
    kernel(*_factors(terms), *refs)
    return {name: jax.freeze(ref) for name, ref in merged.items()}
