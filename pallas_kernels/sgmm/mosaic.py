"""SGMM on Hopper in one launch: copies by TMA, products by wgmma, the two overlapped by three warpgroups.

Every linear of every layer is cut into tiles. One thread block runs on each multiprocessor and goes over its tiles:

    total = base[tile]                                              fp32, in registers
    for j in terms:  total += c_j · (B[e_j, rows] @ A[e_j, :, columns])
    W[tile] = total                                                 rounded once, from the buffer in which the base came

One warpgroup only issues copies, as far ahead as three rings in shared memory allow: of base tiles, of slabs of A and of
slabs of B. The other two compute 64 rows each. Neighbouring blocks take neighbouring tiles, so that all blocks together read
whole rows of W, and share the slabs in the L2 cache.
"""

from __future__ import annotations

import math
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

GROUPS, ROWS = 2, 64  # warpgroups that compute, and the rows of a tile that each takes
TILE_M = GROUPS * ROWS
SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Tiles of `TILE_M` rows and `tile_n` columns, `w_slots` of them in shared memory, and `slots` slabs of A and of B."""

    tile_n: int
    w_slots: int
    slots: int

    def shared_memory(self, rank: int, itemsize: int) -> int:
        """Bytes of a block's rings and barriers."""
        tile, slabs = TILE_M * self.tile_n, rank * (self.tile_n + TILE_M)
        return (self.w_slots * tile + self.slots * slabs) * itemsize + 2048


def configure(rank: int, itemsize: int) -> Config | None:
    """The first that fits, best first; None if nothing does."""
    for tile_n, w_slots, least in ((128, 3, 3), (128, 2, 2), (64, 3, 2), (64, 2, 2)):
        for slots in range(8, least - 1, -1):
            config = Config(tile_n=tile_n, w_slots=w_slots, slots=slots)
            if config.shared_memory(rank, itemsize) <= SHARED_MEMORY:
                return config
    return None


def obstacle(weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    """Why these shapes cannot run here, or None."""
    for name, w in weights.items():
        rank = a[name].shape[2]
        if w.dtype.itemsize != 2:
            return f"{name} is {w.dtype}, and the tensor cores multiply bfloat16 and float16"
        if w.shape[1] % 8 or w.shape[2] % 16:
            return f"{name} is [{w.shape[1]}, {w.shape[2]}], and copies need multiples of 8 and 16"
        if configure(rank + -rank % 16, w.dtype.itemsize) is None:
            return f"slabs of rank {rank} do not fit the shared memory"
    return None


def _kernel(
    experts_gmem,  # [J] ids; those that count come first
    coefficients_gmem,  # [J]
    num_terms_gmem,  # [1] how many count
    *refs,  # of every target: W, A, B and, unless that is W itself, the base
    w_smem,  # [w_slots, TILE_M, tile_n]
    a_smem,  # [slots, R, tile_n]
    b_smem,  # [slots, TILE_M, R]
    w_full, w_empty, slab_full, slab_empty,
    refs_per_target,
):  # fmt: skip
    (w_slots, _, tile_n), slots = w_smem.shape, a_smem.shape[0]
    segments = [refs[i : i + refs_per_target] for i in range(0, len(refs), refs_per_target)]
    group, num_terms = lax.axis_index("group"), num_terms_gmem[0]
    start = jnp.int32(0), jnp.int32(0)  # tiles and pairs of slabs passed through the rings

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def next_slot(count, slots, empty):
            @pl.when(count >= slots)
            def _():
                plgpu.barrier_wait(empty.at[count % slots])

            return count % slots

        counts = start
        for w_gmem, a_gmem, b_gmem, *pristine_gmem in segments:
            base_gmem = pristine_gmem[0] if pristine_gmem else w_gmem

            def visit(layer, row, column, counts, base_gmem=base_gmem, a_gmem=a_gmem, b_gmem=b_gmem):
                tiles, slabs = counts
                rows, columns = pl.ds(row, TILE_M), pl.ds(column, tile_n)
                slot = next_slot(tiles, w_slots, w_empty)
                plgpu.copy_gmem_to_smem(base_gmem.at[layer, rows, columns], w_smem.at[slot], w_full.at[slot])

                @pl.loop(0, num_terms)
                def _(j):
                    slot = next_slot(slabs + j, slots, slab_empty)
                    expert, full = experts_gmem[j], slab_full.at[slot]
                    plgpu.copy_gmem_to_smem(a_gmem.at[layer, expert, :, columns], a_smem.at[slot], full)
                    plgpu.copy_gmem_to_smem(b_gmem.at[layer, expert, rows, :], b_smem.at[slot], full)

                return tiles + 1, slabs + num_terms

            counts = _walk(base_gmem.shape, tile_n, visit, counts)

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        rows, accumulator = pl.ds(group * ROWS, ROWS), plgpu.ACC((ROWS, tile_n), jnp.float32)
        counts = start
        for w_gmem, *_ in segments:

            def visit(layer, row, column, counts, w_gmem=w_gmem):
                tiles, slabs = counts

                def multiply(j, acc):
                    slot = (slabs + j) % slots
                    plgpu.barrier_wait(slab_full.at[slot])
                    plgpu.wgmma(acc, b_smem.at[slot, rows], a_smem.at[slot])

                def add(j, acc, total, pending):
                    product = plgpu.wgmma_accumulator_load(acc, wait_n=pending)
                    plgpu.barrier_arrive(slab_empty.at[(slabs + j) % slots])
                    return total + coefficients_gmem[j] * product

                def add_two(pair, total):
                    """Two products are on their way at once: one is added while the tensor cores work on the other."""
                    first, second = 2 * pair, 2 * pair + 1

                    def products(acc0, acc1):
                        multiply(first, acc0)
                        multiply(second, acc1)
                        return add(second, acc1, add(first, acc0, total, 1), 0)

                    return pl.run_scoped(products, accumulator, accumulator)

                def add_last(total):
                    def product(acc):
                        multiply(num_terms - 1, acc)
                        return add(num_terms - 1, acc, total, 0)

                    return pl.run_scoped(product, accumulator)

                slot = tiles % w_slots
                plgpu.barrier_wait(w_full.at[slot])
                total = w_smem[slot, rows].astype(jnp.float32)
                total = lax.fori_loop(0, num_terms // 2, add_two, total)
                total = lax.cond(num_terms % 2 == 1, add_last, lambda total: total, total)
                w_smem[slot, rows] = total.astype(w_smem.dtype)
                plgpu.commit_smem()
                tile = w_gmem.at[layer, pl.ds(row + group * ROWS, ROWS), pl.ds(column, tile_n)]
                plgpu.copy_smem_to_gmem(w_smem.at[slot, rows], tile)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)

                @pl.when(tiles > 0)  # the tile before this one has left its slot
                def _():
                    plgpu.barrier_arrive(w_empty.at[(tiles - 1) % w_slots])

                return tiles + 1, slabs + num_terms

            counts = _walk(w_gmem.shape, tile_n, visit, counts)
        plgpu.wait_smem_to_gmem(0)


def _walk(shape, tile_n, visit, carry):
    """visit(layer, row, column, carry) → carry for this block's tiles of one linear, W [L, out, in]."""
    num_layers, out_dim, in_dim = shape
    block, num_blocks = lax.axis_index("block"), lax.axis_size("block")
    down, across = pl.cdiv(out_dim, TILE_M), pl.cdiv(in_dim, tile_n)

    def tile(i, carry):
        tile = i * num_blocks + block
        strip = tile // across
        return visit(strip // down, strip % down * TILE_M, tile % across * tile_n, carry)

    return lax.fori_loop(0, pl.cdiv(num_layers * down * across - block, num_blocks), tile, carry)


def _multiprocessors() -> int:
    """Of the device; two on one that has none, where the kernel is interpreted."""
    return getattr(jax.devices()[0], "core_count", 2)


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
    """See `pallas_kernels.sgmm.sgmm`. `num_blocks` thread blocks run (default: one on each multiprocessor).

    Ranks that are no multiple of 16 are padded, which copies A and B. Raises `ValueError` as `obstacle` says.
    """
    why_not = obstacle(weights, a)
    if why_not is not None:
        raise ValueError(f"sgmm cannot run as pallas: {why_not}")
    names = sorted(weights)
    dtype, padding = weights[names[0]].dtype, -a[names[0]].shape[2] % 16
    if padding:
        a = {name: jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for name, x in a.items()}
        b = {name: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) for name, x in b.items()}
    rank = a[names[0]].shape[2]
    config = config or configure(rank, dtype.itemsize)
    assert config is not None

    def ring(slots, rows, columns, swizzled):
        swizzle = plgpu.find_swizzle(swizzled * dtype.itemsize * 8)
        tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))  # type: ignore[abstract]
        transforms = tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
        return plgpu.SMEM((slots, rows, columns), dtype, transforms=transforms)

    columns = math.gcd(config.tile_n, *(w.shape[2] for w in weights.values()))
    operand = math.gcd(columns, rank)  # wgmma wants one swizzle for both operands
    merged = {name: jax.new_ref(weights[name]) for name in names}
    refs = [x for n in names for x in (merged[n], a[n], b[n], *([] if pristine is None else [pristine[n]]))]
    kernel = plgpu.kernel(
        partial(_kernel, refs_per_target=len(refs) // len(names)),
        out_type=(),
        grid=(num_blocks or _multiprocessors(),),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types={
            "w_smem": ring(config.w_slots, TILE_M, config.tile_n, columns),
            "a_smem": ring(config.slots, rank, config.tile_n, operand),
            "b_smem": ring(config.slots, TILE_M, rank, operand),
            "w_full": plgpu.Barrier(num_barriers=config.w_slots),
            "w_empty": plgpu.Barrier(num_barriers=config.w_slots, num_arrivals=GROUPS),
            "slab_full": plgpu.Barrier(num_barriers=config.slots, num_arrivals=2),
            "slab_empty": plgpu.Barrier(num_barriers=config.slots, num_arrivals=GROUPS),
        },
        interpret=interpret,
    )
    order = jnp.argsort(terms.coefficients == 0, stable=True)
    num_terms = jnp.count_nonzero(terms.coefficients).astype(jnp.int32)[None]
    kernel(terms.experts[order].astype(jnp.int32), terms.coefficients[order], num_terms, *refs)
    return {name: jax.freeze(ref) for name, ref in merged.items()}
