"""The parts of sums that blocks leave each other, and x, stay in the L2 cache while the weights pass through it.

A layer's weights are eight times that cache, so what is not used for some 11 µs is gone: parts of sums that were stored
early in a phase come from the device memory when they are read, behind the weights under way. And a single row's part is a
column of a piece: what else is in the lines must come from there too before any of them can be read. So the places of x
and of a layer's parts are marked as the last to be evicted at the launch's start, and as any other at its end.
"""

from __future__ import annotations

import math
from typing import Any

from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from pallas_kernels.decode_token.shares import share

LINE, THREADS = 128, 128
"""Bytes of a cache line; threads of a warpgroup."""
KEEP, LET_GO = "prefetch.global.L2::evict_last [$0];", f"applypriority.global.L2::evict_normal [$0], {LINE};"


def mark(how: str, refs: list[Any], num_blocks: int):
    """KEEP or LET_GO the lines of `refs` in device memory, of whose rows this block takes its share."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def mark_row(_, row):
        i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        kind = ir.MemRefType(row.type)
        lines = math.prod(kind.shape) * utils.bytewidth(kind.element_type) // LINE
        start = utils.memref_ptr(row)
        thread = arith.remui(utils.thread_idx(), utils.c(THREADS, i32))
        for first in range(0, lines, THREADS):
            line = arith.addi(thread, utils.c(first, i32))
            address = utils.getelementptr(start, [arith.muli(line, utils.c(LINE, i32))], i8)
            there = arith.cmpi(arith.CmpIPredicate.ult, line, utils.c(lines, i32))
            utils.inline_ptx(how, address, predicate=there, has_side_effects=True)

    for ref in refs:
        first, number = share(0, ref.shape[0], lax.axis_index("block"), num_blocks)

        def one(n, _, ref=ref, first=first):
            mark_row(ref.at[first + n * num_blocks])

        lax.fori_loop(0, number, one, None)
