"""L2 eviction priorities: partial sums and x stay in the L2 cache while the weights pass through it.

A layer's weights are eight times that cache, so what is not used for some 11 µs is evicted: partial sums that were stored
early in a phase come from device memory when they are read, behind the weights in flight. And a partial sum of a batch
of one is a column of a tile: the other columns of its cache lines must come from there, too, before any can be read. So
x and a layer's partial sums are marked *evict last* at the launch's start, and *evict normal* at its end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from pallas_kernels.megakernel.buffers import Buffers
from pallas_kernels.megakernel.plan import Plan
from pallas_kernels.megakernel.schedule import strided_share

LINE_BYTES, THREADS = 128, 128
"""Bytes of a cache line, threads of a warpgroup."""
EVICT_LAST = "prefetch.global.L2::evict_last [$0];"
EVICT_NORMAL = f"applypriority.global.L2::evict_normal [$0], {LINE_BYTES};"


def resident(buffers: Buffers, plan: Plan) -> list[Any]:
    """Buffers that get the hint *evict last*: x, and the partial sums of a layer."""
    refs = [buffers.x, *partial_sums_of_layers(buffers, plan)]
    if buffers.device_partials is not None:
        refs += [buffers.device_partials.at[index] for index in np.ndindex(*buffers.device_partials.shape[:3])]
    return refs


def partial_sums_of_layers(buffers: Buffers, plan: Plan) -> list[Any]:
    """The places of a layer's partial sums: the head has more."""
    y = [buffers.y_partials.at[number, pl.ds(0, tiles)] for number, tiles in enumerate(plan.tiles_by_partial())]
    return y if buffers.t_partials is None else [buffers.t_partials.at[i] for i in range(plan.t_buffers)] + y


def set_priority(instruction: str, refs: list[Any], num_ctas: int):
    """Give the lines of `refs` in device memory a priority; this CTA does its share of their rows."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def mark_row(_, row):
        i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        kind = ir.MemRefType(row.type)
        lines = math.prod(kind.shape) * utils.bytewidth(kind.element_type) // LINE_BYTES
        start = utils.memref_ptr(row)
        thread = arith.remui(utils.thread_idx(), utils.c(THREADS, i32))
        for first in range(0, lines, THREADS):
            line = arith.addi(thread, utils.c(first, i32))
            address = utils.getelementptr(start, [arith.muli(line, utils.c(LINE_BYTES, i32))], i8)
            exists = arith.cmpi(arith.CmpIPredicate.ult, line, utils.c(lines, i32))
            utils.inline_ptx(instruction, address, predicate=exists, has_side_effects=True)

    for ref in refs:
        first, number = strided_share(0, ref.shape[0], lax.axis_index("cta"), num_ctas)

        def one(n, _, ref=ref, first=first):
            mark_row(ref.at[first + n * num_ctas])

        lax.fori_loop(0, number, one, None)
