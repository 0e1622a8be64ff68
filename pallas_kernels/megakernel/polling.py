"""Exchange of partial sums without semaphores, in a batch of one: who needs a partial sum reads it until it is there.

A semaphore takes three ways to the L2 cache and back: the writer waits until its stores are visible before it signals,
the reader polls the signal, and then reads the data. Here the reader polls the data. A place that holds no partial sum
yet holds `NOT_STORED`, the bits of a NaN that no arithmetic gives (that of the hardware is 0x7FFFFFFF). Words of 32 bits
are stored as a whole, so each says for itself whether it is there, and no order between them matters. A partial sum of
y has one reader, who leaves its place `NOT_STORED`; it is written again in a later phase, so after a grid barrier. A
partial sum of A x has several: the next phase marks its place while it uses others, and the one after writes it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf, vector

from pallas_kernels.megakernel.schedule import strided_share
from pallas_kernels.megakernel.sizes import WGMMA_M, WGMMA_N

NOT_STORED = -1
THREADS, WORD_BYTES = 128, 4
"""Threads of a warpgroup, bytes of a number in fp32."""
SHAPE = WGMMA_M, WGMMA_N
STORE_TWICE = "st.relaxed.gpu.global.v2.b32 [$0], {$1, $1};"
LOAD_IF_MISSING = """{
    .reg .pred missing;
    setp.eq.b32 missing, $3, $5;
    setp.eq.or.b32 missing, $4, $5, missing;
    mov.b32 $0, $3;
    mov.b32 $1, $4;
    @missing ld.relaxed.gpu.global.v2.b32 {$0, $1}, [$2];
}"""
"""($0, $1): the two numbers at $2, unless ($3, $4) are: so polling reads what is missing only, and leaves the L2 cache to
the weights. $5: `NOT_STORED`."""


def is_whole(columns: Any) -> bool:
    """True if so many columns are certain to be all of a tile."""
    return isinstance(columns, int) and columns >= WGMMA_N


def load_when_stored(refs: Sequence[Any], columns: Sequence[Any], *, forget: bool) -> list[Any]:
    """Tiles [WGMMA_M, WGMMA_N] of fp32 in device memory, of each as many columns as asked for, once they are stored; the
    others hold anything. All of them are loading at once. `forget`: leave them `NOT_STORED`."""
    counted = [i for i, number in enumerate(columns) if not is_whole(number)]
    numbers = plgpu.broadcasted_iota(jnp.int32, SHAPE, 1, layout=plgpu.Layout.WGMMA)
    beyond = [jnp.int32(columns[i]) - numbers for i in counted]  # 0 or less in columns that are not asked for
    tile = plgpu.ShapeDtypeStruct(SHAPE, jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * len(refs), *[plgpu.Layout.WGMMA] * len(counted)),
        return_type=[tile] * len(refs),
    )
    def poll(_, *arguments):
        refs, beyond = arguments[: len(columns)], dict(zip(counted, arguments[len(columns) :], strict=True))
        i32, layout = ir.IntegerType.get_signless(32), fragmented_array.WGMMA_LAYOUT
        zero, not_stored = utils.c(0, i32), utils.c(NOT_STORED, i32)
        transfers = []  # (tile, its registers' place, pointer to two numbers)
        for i, ref in enumerate(refs):
            tiled = utils.memref_reshape(ref, (1, 1, *SHAPE))
            parts = fragmented_array.FragmentedArray.transfer_tiled(tiled, 16, layout, SHAPE, False)
            transfers += [(i, get, update, pointer) for get, update, _, pointer in parts]

        loop = scf.WhileOp([i32] * (2 * len(transfers)), [not_stored] * (2 * len(transfers)))
        before = loop.before.blocks.append(*[i32] * (2 * len(transfers)))
        with ir.InsertionPoint(before):
            words: list[Any] = []
            last = zero  # the largest, as numbers without sign
            for n, (i, get, _, pointer) in enumerate(transfers):
                two = utils.inline_ptx(
                    LOAD_IF_MISSING, pointer, *before.arguments[2 * n : 2 * n + 2], not_stored,
                    result_types=(i32, i32), has_side_effects=True,
                )  # fmt: skip
                words += two
                for column, word in enumerate(two):
                    if i in beyond:
                        left = vector.extract(get(beyond[i].registers), [], [column])
                        word = arith.select(arith.cmpi(arith.CmpIPredicate.sgt, left, zero), word, zero)
                    last = arith.maxui(last, word)
            scf.condition(arith.cmpi(arith.CmpIPredicate.eq, last, not_stored), words)
        after = loop.after.blocks.append(*[i32] * len(words))
        with ir.InsertionPoint(after):
            scf.yield_(after.arguments)

        registers = [np.full(layout.registers_shape(SHAPE), None, dtype=object) for _ in refs]
        for n, (i, _, update, pointer) in enumerate(transfers):
            if forget:
                utils.inline_ptx(STORE_TWICE, pointer, not_stored, has_side_effects=True)
            two = vector.from_elements(ir.VectorType.get((2,), i32), list(loop.results[2 * n : 2 * n + 2]))
            update(registers[i], vector.bitcast(ir.VectorType.get((2,), ir.F32Type.get()), two))
        return [fragmented_array.FragmentedArray(_registers=own, _layout=layout, _is_signed=None) for own in registers]

    return poll(*refs, *beyond)


def mark_not_stored(refs: Sequence[Any], num_ctas: int) -> None:
    """Fill `refs` in device memory with `NOT_STORED`; this CTA does its share of their rows."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def fill_row(_, row):
        i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        words = math.prod(ir.MemRefType(row.type).shape)
        start, thread = utils.memref_ptr(row), arith.remui(utils.thread_idx(), utils.c(THREADS, i32))
        for first in range(0, words, 2 * THREADS):
            place = arith.addi(arith.muli(thread, utils.c(2, i32)), utils.c(first, i32))
            address = utils.getelementptr(start, [arith.muli(place, utils.c(WORD_BYTES, i32))], i8)
            utils.inline_ptx(STORE_TWICE, address, utils.c(NOT_STORED, i32), has_side_effects=True)

    for ref in refs:
        first, number = strided_share(0, ref.shape[0], lax.axis_index("cta"), num_ctas)

        def fill(n, _, ref=ref, first=first):
            fill_row(ref.at[first + n * num_ctas])

        lax.fori_loop(0, number, fill, None)
