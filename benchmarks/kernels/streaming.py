"""Throughput of a kernel of one thread block per multiprocessor that streams weights through shared memory, and the cost
of a barrier.

    python -m benchmarks.kernels.streaming

prints a row for each variant: TB/s, and µs per phase. W [layers, rows, columns] is read in chunks of 16 KiB, one
phase per layer, by the copies of `pallas_kernels.megakernel` and nothing else: a bound for the megakernel's step. A barrier
is over the whole grid, after each phase; `stored`: each block stores a tile's sums before it; `input`: it loads the input of
the next phase after it. With fewer copies in flight at a phase's start such stores and loads wait less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from benchmarks.common.timing import time_calls
from pallas_kernels.megakernel.kernel_sm90 import COMPILER_PARAMS
from pallas_kernels.megakernel.pipeline import Pipeline
from pallas_kernels.megakernel.register_tiles import ROWS, load, store
from pallas_kernels.megakernel.sizes import TILE_K, WGMMA_M

DTYPE = jnp.bfloat16
LAYERS, COLUMNS = 32, 3072
INPUT_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Chunks [rows, columns]; every block reads one of `slices` parts of the columns, through a pipeline of `stages`, of
    which `quiet` are in flight at once when a phase begins."""

    rows: int = 128
    columns: int = TILE_K
    slices: int = 1
    stages: int = 12
    quiet: int = 12
    barriers: int = 0
    stored: bool = False
    input: bool = False

    def __str__(self) -> str:
        text = f"{self.rows} x {self.columns}, {self.slices} slices, {self.stages} stages, {self.barriers} barriers"
        text += f", {self.quiet} at first" if self.quiet < self.stages else ""
        return text + ", stored" * self.stored + ", input" * self.input


VARIANTS = (
    Variant(), Variant(slices=4), Variant(rows=64, columns=128), Variant(rows=32, columns=256), Variant(stages=6),
    *(Variant(slices=4, barriers=n, input=i) for i in (False, True) for n in (1, 2)),
    *(Variant(quiet=n, slices=4, barriers=2, stored=True, input=True) for n in (12, 6, 4, 3, 2, 1)),
)  # fmt: skip


def make(variant: Variant, num_blocks: int) -> Callable[[Array, Array], Array]:
    """f(W [L, blocks · 128, columns], input [INPUT_ROWS, TILE_K]) → a number for each block."""
    cta_groups, chunks = num_blocks // variant.slices, COLUMNS // variant.slices // variant.columns
    per_phase = num_blocks * 128 // variant.rows // cta_groups * chunks

    def kernel(w, x, sums, done, stages_smem, full, empty, x_smem):
        block = lax.axis_index("cta")
        pipeline = Pipeline(stages_smem, full, empty, copies_during_exchange=variant.quiet)
        part, cta_group = block % variant.slices, block // variant.slices
        grid_barrier = pl.get_global(plgpu.SemaphoreType.REGULAR)

        def source(layer, i):
            rows = pl.ds((cta_group + i // chunks * cta_groups) * variant.rows, variant.rows)
            return w.at[layer, rows, pl.ds((part * chunks + i % chunks) * variant.columns, variant.columns)]

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _copy():
            def phase(layer, state):
                return pipeline.produce(state.begin(), per_phase, lambda i: ([lambda: [source(layer, i)]], 0))

            lax.fori_loop(0, LAYERS, phase, pipeline.start())

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _take():
            def take(i, count):
                pipeline.take(count)
                pipeline.release(count)
                return count + 1

            def phase(layer, count):
                if variant.input:
                    for row in range(0, INPUT_ROWS, WGMMA_M):
                        x_smem.at[pl.ds(row, WGMMA_M)][...] = load(
                            x.at[pl.ds(row, WGMMA_M)], plgpu.Layout.WGMMA_UPCAST_4X
                        )
                    plgpu.commit_smem()
                count = lax.fori_loop(0, per_phase, take, count)
                for i in range(variant.barriers):
                    if variant.stored:
                        tile = lax.broadcast_in_dim(jnp.float32(layer + i), (WGMMA_M, 8), ())
                        store(sums.at[block], plgpu.layout_cast(tile, plgpu.Layout.WGMMA))
                    plgpu.semaphore_signal(grid_barrier, 1, memory_scope="gpu")
                    number = num_blocks * (layer * variant.barriers + i + 1)
                    plgpu.semaphore_wait(grid_barrier, number, decrement=False, memory_scope="gpu")
                return count

            count = lax.fori_loop(0, LAYERS, phase, jnp.int32(0))
            done.at[block][...] = plgpu.layout_cast(jnp.full((WGMMA_M,), 1.0, jnp.float32), ROWS) * count

    def operand(*shape: int) -> Any:
        transforms = plgpu.TilingTransform((8, TILE_K)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]
        return plgpu.SMEM(shape, DTYPE, transforms=transforms)

    def run(w: Array, x: Array) -> Array:
        done = jax.empty_ref(jax.ShapeDtypeStruct((num_blocks, WGMMA_M), jnp.float32))
        sums = jax.empty_ref(jax.ShapeDtypeStruct((num_blocks, WGMMA_M, 8), jnp.float32))
        plgpu.kernel(
            kernel,
            out_type=(),
            grid=(num_blocks,),
            grid_names=("cta",),
            num_threads=2,
            thread_name="warpgroup",
            scratch_types={
                "stages_smem": operand(variant.stages, variant.rows, variant.columns),
                "full": plgpu.Barrier(num_barriers=variant.stages),
                "empty": plgpu.Barrier(num_barriers=variant.stages),
                "x_smem": operand(INPUT_ROWS, TILE_K),
            },
            compiler_params=COMPILER_PARAMS,
        )(w, x, sums, done)
        return jax.freeze(done)

    return run


def shapes(num_blocks: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    weights = LAYERS, num_blocks * 128, COLUMNS
    return jax.ShapeDtypeStruct(weights, DTYPE), jax.ShapeDtypeStruct((INPUT_ROWS, TILE_K), DTYPE)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = jax.devices()[0]
    num_blocks = device.core_count
    print(device.device_kind, jax.__version__)
    abstract = shapes(num_blocks)
    w = jax.random.bits(jax.random.key(0, impl="rbg"), abstract[0].shape, jnp.uint16)
    w, x = lax.bitcast_convert_type(w & 0x3FFF, DTYPE), jnp.ones(abstract[1].shape, DTYPE)
    variants = [variant for variant in VARIANTS if num_blocks % variant.slices == 0]  # else not all of W is read
    with ThreadPoolExecutor() as pool:
        compiled = list(
            pool.map(lambda variant: jax.jit(make(variant, num_blocks)).lower(*abstract).compile(), variants)
        )

    def read(step: Callable[[Array, Array], Array], _: Any) -> Array:
        return step(w, x)

    for variant, step in zip(variants, compiled, strict=True):
        timing, _ = time_calls(partial(read, step), None, calls=8, repeats=7)
        speed, phase = w.nbytes / timing.ms / 1e9, 1e3 * timing.ms / LAYERS
        print(f"{variant!s:70} {timing}  {speed:.3f} TB/s  {phase:.2f} µs per phase", flush=True)


if __name__ == "__main__":
    main()
