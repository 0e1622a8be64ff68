"""Exchange of partial sums and of h without semaphores: who needs a number reads it until it is there.

A semaphore takes three ways to the L2 cache and back: the writer waits until its stores are visible before it signals,
the reader polls the signal, and then reads the data. Here the reader polls the data. A place that holds no result yet
holds `NOT_STORED` in all its bits, a NaN that no arithmetic gives (the hardware's is 0x7FFFFFFF, in bfloat16 0x7FFF).
A number is stored as a whole, so each says for itself whether it is there, and no order between them matters.

A place with one reader is left `NOT_STORED` by it and written again in a later phase, so after a grid barrier. Of places
with several (h, and partial sums of A x in a batch of one) there are two buffers in turn: while a phase uses one, it marks
the other, which the phase before has read and the phase after writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf, vector

from pallas_kernels.megakernel.schedule import strided_share

NOT_STORED = -1
THREADS, WORD_BYTES = 128, 4
"""Threads of a warpgroup, bytes of a register."""
STORE_TWO = "st.relaxed.gpu.global.v2.b32 [$0], {$1, $1};"


def load_if_missing(words: int) -> str:
    """PTX: the words ($0, …) are those at the pointer after them, if the number after that is not 0, or else the old ones,
    which come last. So polling leaves the L2 cache to the weights."""
    new, pointer = [f"${i}" for i in range(words)], f"${words}"
    keep = "".join(f"mov.b32 {word}, ${words + 2 + i}; " for i, word in enumerate(new))
    load = f"@missing ld.relaxed.gpu.global.v{words}.b32 {{{', '.join(new)}}}, [{pointer}];"
    return f"{{ .reg .pred missing; setp.ne.b32 missing, ${words + 1}, 0; {keep}{load} }}"


def load_when_stored(
    refs: Sequence[Any],
    counts: Sequence[Any],
    *,
    dimension: int,
    layout: Any = plgpu.Layout.WGMMA,
    forget: bool = False,
) -> list[Any]:
    """Matrices in device memory, of fp32 or bfloat16, once they are stored: all of them are loading at once. Of each the
    first of its rows (`dimension` 0) or columns (1), as many as `counts` says; the others hold anything. `forget`: leave
    them `NOT_STORED`."""
    shapes, dtype = [ref.shape for ref in refs], refs[0].dtype
    some = [i for i, count in enumerate(counts) if not isinstance(count, int) or count < shapes[i][dimension]]
    tiles = [plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout) for shape in shapes]
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), *[scalar] * len(some)), return_type=tiles)
    def poll(_, *arguments):
        refs, limits = arguments[: len(shapes)], dict(zip(some, arguments[len(shapes) :], strict=True))
        registers_of, transfers = [], []
        for i, (ref, shape) in enumerate(zip(refs, shapes, strict=True)):
            of_mgpu, tiled = layout.to_mgpu(), utils.memref_reshape(ref, (1, 1, *shape))
            registers_of.append(np.full(of_mgpu.registers_shape(shape), None, dtype=object))
            parts = fragmented_array.FragmentedArray.transfer_tiled(tiled, 16, of_mgpu, shape, False)
            for _, update, _, pointer in parts:
                limit = None
                if i in limits:
                    limit = _place(pointer, ref, shape, dimension), dimension, limits[i].registers.flat[0]
                transfers.append((pointer, limit, lambda value, i=i, update=update: update(registers_of[i], value)))
        vector_type = ir.VectorType.get((of_mgpu.vector_length,), utils.dtype_to_ir_type(jnp.dtype(dtype)))
        results = _poll([(pointer, limit) for pointer, limit, _ in transfers], vector_type, forget)
        for (_, _, put), value in zip(transfers, results, strict=True):
            put(value)
        return [
            fragmented_array.FragmentedArray(_registers=registers, _layout=of_mgpu, _is_signed=None)
            for registers in registers_of
        ]

    return poll(*refs, *(jnp.int32(counts[i]) for i in some))


def _place(pointer, ref, shape, dimension: int):
    """Row or column of the number at `pointer` in the matrix `ref`."""
    i32 = ir.IntegerType.get_signless(32)
    number = utils.inline_ptx(
        "{ .reg .b64 bytes; sub.s64 bytes, $1, $2; cvt.u32.u64 $0, bytes; }",
        pointer, utils.memref_ptr(ref), result_types=i32,
    )  # fmt: skip
    number = arith.divui(number, utils.c(utils.bytewidth(ir.MemRefType(ref.type).element_type), i32))
    return (arith.remui if dimension else arith.divui)(number, utils.c(shape[1], i32))


def _poll(sources, vector_type, forget: bool) -> list[Any]:
    """Vectors at pointers, when they are stored. A source is (pointer, None) or (pointer, (place, step, limit)): a number
    is waited for if its place is below the limit, and that is `step` more from word to word."""
    i32 = ir.IntegerType.get_signless(32)
    bits = utils.bitwidth(vector_type.element_type)
    words, zero = math.prod(vector_type.shape) * bits // 32, utils.c(0, i32)
    load, missing = load_if_missing(words), _missing(bits)
    types = [i32] * (words * len(sources))
    loop = scf.WhileOp(types, [utils.c(NOT_STORED, i32)] * len(types))
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint(before):
        found: list[Any] = []
        any_missing = zero
        for n, (pointer, limit) in enumerate(sources):
            old = before.arguments[words * n : words * (n + 1)]
            is_missing = _any([missing(word) for word in old])
            new = utils.inline_ptx(load, pointer, is_missing, *old, result_types=[i32] * words, has_side_effects=True)
            flags = [missing(word) for word in new]
            if limit is not None:
                place, step, below = limit
                places = [arith.addi(place, utils.c(step * k, i32)) for k in range(words)]
                counts = [arith.cmpi(arith.CmpIPredicate.slt, at, below) for at in places]
                flags = [arith.select(count, flag, zero) for count, flag in zip(counts, flags, strict=True)]
            any_missing = _any([any_missing, *flags])
            found += new
        scf.condition(arith.cmpi(arith.CmpIPredicate.ne, any_missing, zero), found)
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_(after.arguments)
    values = []
    for n, (pointer, _) in enumerate(sources):
        if forget:
            for word in range(0, words, 2):
                ptx = STORE_TWO.replace("[$0]", f"[$0+{word * WORD_BYTES}]")
                utils.inline_ptx(ptx, pointer, utils.c(NOT_STORED, i32), has_side_effects=True)
        own = list(loop.results[words * n : words * (n + 1)])
        values.append(vector.bitcast(vector_type, vector.from_elements(ir.VectorType.get((words,), i32), own)))
    return values


def _any(flags):
    first, *others = flags
    for flag in others:
        first = arith.ori(first, flag)
    return first


def _missing(bits: int) -> Callable[[Any], Any]:
    """Function of a word: not 0 if it, or of two numbers of 16 bits one, is `NOT_STORED`."""
    i32 = ir.IntegerType.get_signless(32)

    def is_word(word):
        return arith.extui(i32, arith.cmpi(arith.CmpIPredicate.eq, word, utils.c(NOT_STORED, i32)))

    def is_half(word):  # a half of ~word is 0: only then does subtracting 1 set its highest bit, which it had not
        inverse = arith.xori(word, utils.c(-1, i32))
        borrowed = arith.andi(arith.subi(inverse, utils.c(0x00010001, i32)), word)
        return arith.andi(borrowed, utils.c(-0x7FFF8000, i32))  # 0x80008000

    return is_word if bits == 32 else is_half


def mark_not_stored(ref: Any) -> None:
    """Fill a contiguous `ref` in device memory, of a multiple of 1 KB, with `NOT_STORED`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def fill(_, ref):
        i32, i8, kind = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8), ir.MemRefType(ref.type)
        start, thread = utils.memref_ptr(ref), arith.remui(utils.thread_idx(), utils.c(THREADS, i32))
        for first in range(0, math.prod(kind.shape) * utils.bytewidth(kind.element_type), 2 * WORD_BYTES * THREADS):
            place = arith.addi(arith.muli(thread, utils.c(2 * WORD_BYTES, i32)), utils.c(first, i32))
            address = utils.getelementptr(start, [place], i8)
            utils.inline_ptx(STORE_TWO, address, utils.c(NOT_STORED, i32), has_side_effects=True)

    fill(ref)


def mark_rows_not_stored(refs: Sequence[Any], num_ctas: int) -> None:
    """`mark_not_stored` this CTA's share of the rows of `refs`."""
    for ref in refs:
        first, number = strided_share(0, ref.shape[0], lax.axis_index("cta"), num_ctas)

        def fill(n, _, ref=ref, first=first):
            mark_not_stored(ref.at[first + n * num_ctas])

        lax.fori_loop(0, number, fill, None)
