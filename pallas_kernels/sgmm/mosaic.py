"""SGMM on Hopper in one launch: copies by TMA, products by wgmma, the two overlapped by three warpgroups.

Work is cut into *strips*, `TILE_M` rows of one linear of one layer, and a strip into tiles of `TILE_N` columns. For its strip
a thread block keeps the rows of every selected B in shared memory, and then, tile by tile,

    total = base[strip, tile]                    fp32, in registers
    for j in terms:  total += c_j · (B[e_j] @ A[e_j, :, tile])
    W[strip, tile] = total                       rounded once, written from the buffer the base came in

The last warpgroup only issues copies, as far ahead as the buffers allow: base tiles go round a ring of `w_slots`, slabs of A
[R, TILE_N] round a ring of `a_slots`. The other two each compute 64 rows. Blocks walk the strips together, so that those in
flight share their A in the L2 cache; strips that do not fill a last wave are cut evenly over all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.sgmm.terms import Terms

TILE_M, TILE_N, ROWS = 128, 64, 64  # a warpgroup computes ROWS of a tile
SHARED_MEMORY = 227 * 1024
MAX_SLOTS = 8
PRODUCER, CONSUMERS = 2, 2  # index of the copying warpgroup, number of computing ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the shared memory of one block is used; `b_slots` strips of B are held at once."""

    b_slots: int
    w_slots: int
    a_slots: int


def configure(num_terms: int, rank: int, itemsize: int) -> Config | None:
    """B twice if the rest is still deep enough, then one slab of A per base tile and term; None if nothing fits."""
    strip_b, slab_a, tile_w = (n * itemsize for n in (num_terms * TILE_M * rank, rank * TILE_N, TILE_M * TILE_N))
    for b_slots, least_w in ((2, 3), (1, 2)):
        free = SHARED_MEMORY - 1024 - b_slots * strip_b
        w_slots = min(MAX_SLOTS, (free - 2 * slab_a) // tile_w, max(least_w, free // (tile_w + num_terms * slab_a)))
        if w_slots >= least_w:
            return Config(b_slots=b_slots, w_slots=w_slots, a_slots=min(MAX_SLOTS, (free - w_slots * tile_w) // slab_a))
    return None


def obstacle(weights: dict[str, Array], a: dict[str, Array], terms: Terms) -> str | None:
    """Why these shapes cannot run here, or None."""
    for name, w in weights.items():
        rank = a[name].shape[2]
        if w.dtype.itemsize != 2:
            return f"{name} is {w.dtype} and the tensor cores multiply bfloat16 and float16"
        if w.shape[2] % 8:
            return f"{name} has {w.shape[2]} columns, and copies need a multiple of 8"
        if configure(len(terms.experts), rank + -rank % 16, w.dtype.itemsize) is None:
            return f"{len(terms.experts)} terms of rank {rank} do not fit the shared memory"
    return None


def _tile_transforms(columns: int, itemsize: int) -> tuple:
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def _kernel(
    experts_gmem,  # [J] ids; those that count come first
    coefficients_gmem,  # [J]
    num_terms_gmem,  # [1] how many count
    *refs,  # of every target: W, A, B and, unless that is W itself, the base
    w_smem,  # [w_slots, TILE_M, TILE_N]
    a_smem,  # [a_slots, R, TILE_N]
    b_smem,  # [b_slots, J, TILE_M, R]
    w_full, w_empty, a_full, a_empty, b_full, b_empty,
    refs_per_target,
):  # fmt: skip
    w_slots, a_slots, (b_slots, max_terms) = w_smem.shape[0], a_smem.shape[0], b_smem.shape[:2]
    rank = a_smem.shape[1]
    block, num_blocks = lax.axis_index("block"), lax.axis_size("block")
    group = lax.axis_index("group")
    num_terms = num_terms_gmem[0]
    segments = [refs[i : i + refs_per_target] for i in range(0, len(refs), refs_per_target)]

    def walk(shape: tuple[int, int, int], visit, counters):
        """visit(layer, row, tile, first and last of its strip, counters), for this block's tiles of one target."""
        num_layers, out_dim, in_dim = shape
        strips_per_layer, tiles = pl.cdiv(out_dim, TILE_M), pl.cdiv(in_dim, TILE_N)
        waves, rest = divmod(num_layers * strips_per_layer, num_blocks)
        begin, end = rest * tiles * block // num_blocks, rest * tiles * (block + 1) // num_blocks

        def piece(p, counters):
            """Whole strips first; then this block's share of the rest, [begin, end), which touches two strips at most."""
            whole = p < waves
            offset = (begin // tiles + p - waves) * tiles
            strip = jnp.where(whole, p * num_blocks + block, waves * num_blocks + offset // tiles)
            low = jnp.where(whole, 0, jnp.maximum(begin - offset, 0))
            high = jnp.where(whole, tiles, jnp.minimum(end - offset, tiles))
            layer, row = strip // strips_per_layer, strip % strips_per_layer * TILE_M

            def tile(n, counters):
                return visit(layer, row, n * TILE_N, n == low, n == high - 1, counters)

            return lax.fori_loop(low, high, tile, counters)

        return lax.fori_loop(0, waves + 2 * (rest > 0), piece, counters)

    @pl.when(group == PRODUCER)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        counters = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for w_gmem, a_gmem, b_gmem, *pristine_gmem in segments:
            base_gmem = pristine_gmem[0] if pristine_gmem else w_gmem

            def visit(layer, row, column, first, last, counters, base_gmem=base_gmem, a_gmem=a_gmem, b_gmem=b_gmem):
                tiles_done, slabs_done, strips_done = counters
                slot = tiles_done % w_slots

                @pl.when(tiles_done >= w_slots)
                def _():
                    plgpu.barrier_wait(w_empty.at[slot])

                tile = base_gmem.at[layer, pl.ds(row, TILE_M), pl.ds(column, TILE_N)]
                plgpu.copy_gmem_to_smem(tile, w_smem.at[slot], w_full.at[slot])

                @pl.when(first)
                def _():
                    strip = strips_done % b_slots

                    @pl.when(strips_done >= b_slots)
                    def _():
                        plgpu.barrier_wait(b_empty.at[strip])

                    @pl.loop(0, num_terms)
                    def _(j):
                        plgpu.copy_gmem_to_smem(
                            b_gmem.at[layer, experts_gmem[j], pl.ds(row, TILE_M), :],
                            b_smem.at[strip, j],
                            b_full.at[strip * max_terms + j],
                        )

                @pl.loop(0, num_terms)
                def _(j):
                    slot = (slabs_done + j) % a_slots

                    @pl.when(slabs_done + j >= a_slots)
                    def _():
                        plgpu.barrier_wait(a_empty.at[slot])

                    slab = a_gmem.at[layer, experts_gmem[j], :, pl.ds(column, TILE_N)]
                    plgpu.copy_gmem_to_smem(slab, a_smem.at[slot], a_full.at[slot])

                return tiles_done + 1, slabs_done + num_terms, strips_done + last.astype(jnp.int32)

            counters = walk(base_gmem.shape, visit, counters)

    @pl.when(group < CONSUMERS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        counters = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        rows = pl.ds(group * ROWS, ROWS)
        for w_gmem, *_ in segments:

            def visit(layer, row, column, first, last, counters, w_gmem=w_gmem):
                tiles_done, slabs_done, strips_done = counters
                slot, strip = tiles_done % w_slots, strips_done % b_slots

                @pl.when(first)
                def _():
                    @pl.loop(0, num_terms)
                    def _(j):
                        plgpu.barrier_wait(b_full.at[strip * max_terms + j])

                plgpu.barrier_wait(w_full.at[slot])
                base = w_smem[slot, rows].astype(jnp.float32)

                def add_term(j, total):
                    slot = (slabs_done + j) % a_slots
                    plgpu.barrier_wait(a_full.at[slot])

                    def product(acc):
                        plgpu.wgmma(acc, b_smem.at[strip, j, rows], a_smem.at[slot])
                        return acc[...]

                    ba = pl.run_scoped(product, plgpu.ACC((ROWS, TILE_N), jnp.float32))
                    plgpu.barrier_arrive(a_empty.at[slot])
                    return total + coefficients_gmem[j] * ba

                total = lax.fori_loop(0, num_terms, add_term, base)
                w_smem[slot, rows] = total.astype(w_smem.dtype)
                plgpu.commit_smem()
                tile = w_gmem.at[layer, pl.ds(row + group * ROWS, ROWS), pl.ds(column, TILE_N)]
                plgpu.copy_smem_to_gmem(w_smem.at[slot, rows], tile)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)

                @pl.when(tiles_done > 0)  # the tile before this one has left its slot
                def _():
                    plgpu.barrier_arrive(w_empty.at[(tiles_done - 1) % w_slots])

                @pl.when(last)
                def _():
                    plgpu.barrier_arrive(b_empty.at[strip])

                return tiles_done + 1, slabs_done + num_terms, strips_done + last.astype(jnp.int32)

            counters = walk(w_gmem.shape, visit, counters)
        plgpu.wait_smem_to_gmem(0)


def sgmm_mosaic(
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
    """See `pallas_kernels.sgmm.sgmm`. `num_blocks` thread blocks run (default: one per multiprocessor).

    Ranks that are no multiple of 16 are padded, which copies A and B. Raises `ValueError` as `obstacle` says.
    """
    why_not = obstacle(weights, a, terms)
    if why_not is not None:
        raise ValueError(f"sgmm cannot run as pallas: {why_not}")
    names = sorted(weights)
    dtype, padding = weights[names[0]].dtype, -a[names[0]].shape[2] % 16
    if padding:
        a = {name: jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for name, x in a.items()}
        b = {name: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) for name, x in b.items()}
    rank, max_terms = a[names[0]].shape[2], len(terms.experts)
    config = config or configure(max_terms, rank, dtype.itemsize)
    assert config is not None
    order = jnp.argsort(terms.coefficients == 0, stable=True)
    num_terms = jnp.count_nonzero(terms.coefficients).astype(jnp.int32)[None]

    square, strip = _tile_transforms(TILE_N, dtype.itemsize), _tile_transforms(rank, dtype.itemsize)
    kernel = plgpu.kernel(
        partial(_kernel, refs_per_target=3 if pristine is None else 4),
        out_type=(),
        grid=(num_blocks or jax.devices()[0].core_count,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        scratch_types=dict(
            w_smem=plgpu.SMEM((config.w_slots, TILE_M, TILE_N), dtype, transforms=square),
            a_smem=plgpu.SMEM((config.a_slots, rank, TILE_N), dtype, transforms=square),
            b_smem=plgpu.SMEM((config.b_slots, max_terms, TILE_M, rank), dtype, transforms=strip),
            w_full=plgpu.Barrier(num_barriers=config.w_slots),
            w_empty=plgpu.Barrier(num_barriers=config.w_slots, num_arrivals=CONSUMERS),
            a_full=plgpu.Barrier(num_barriers=config.a_slots),
            a_empty=plgpu.Barrier(num_barriers=config.a_slots, num_arrivals=CONSUMERS),
            b_full=plgpu.Barrier(num_barriers=config.b_slots * max_terms),
            b_empty=plgpu.Barrier(num_barriers=config.b_slots, num_arrivals=CONSUMERS),
        ),
        interpret=interpret,
    )
    merged = {name: jax.new_ref(weights[name]) for name in names}
    operands = [x for n in names for x in (merged[n], a[n], b[n], *([] if pristine is None else [pristine[n]]))]
    kernel(terms.experts[order].astype(jnp.int32), terms.coefficients[order], num_terms, *operands)
    return {name: jax.freeze(ref) for name, ref in merged.items()}
