"""Products with quantised weights, whose codes are dequantised between shared memory and the tensor cores.

    y += Σ_g s_g ∘ ((C_g − 2^(bits−1)) x_g)        over the groups g of columns that share a scale

A code less its offset is exact in bfloat16, so the tensor cores multiply it from registers, and the scale multiplies what
they find of a group, in fp32: W is never rounded. Codes have one byte or half of one (`pallas_kernels.quantised`); a group
of 4 bits has the codes of its first half of columns in the low halves of its bytes, those of the second in the high ones.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from pallas_kernels.megakernel.pipeline import CodesAndScales, Pipeline
from pallas_kernels.megakernel.register_tiles import ROWS, load, over_columns
from pallas_kernels.megakernel.sizes import CODE_BYTES, TILE_K, TILE_M, WGMMA_M
from pallas_kernels.quantised import QuantLayout

BYTES_TO_BF16 = """{
    .reg .b32 both, low, high;
    prmt.b32 both, $1, 0x43, PLACES;
    and.b32 low, both, 0xff7fff7f;
    lop3.b32 high, both, 0xff80ff80, 0x00800080, 0x6a;
    sub.bf16x2 $0, low, high;
}"""
"""Two of the bytes of $1, less 128. 0x43.. is a bfloat16 of 128 and more, by its last 7 bits; the code's first bit is the
exponent's last, and says whether 128 or 256 is subtracted: lop3 is (both & 0xff80) ^ 0x0080."""
HALVES_TO_BF16 = """{
    .reg .b32 both;
    prmt.b32 both, $1, 0, PLACES;
    lop3.b32 both, both, 0x000f000f, 0x43004300, 0xea;
    sub.bf16x2 $0, both, $2;
}"""
"""The low halves of two of the bytes of $1, less 8: 0x430. is 128 + the code, and $2 is 136 twice."""
PLACES = "0x4140", "0x4342"
"""Selectors of the first and second, and of the third and fourth byte, each with a byte of the constant above it."""
EIGHT_MORE = 0x43084308
"""136 in bfloat16, twice."""


class QuantisedProduct:
    """Tiles of quantised weights times the input, chunk by chunk, and of a chunk TILE_K bytes of every row at once."""

    def __init__(self, layout: QuantLayout, pipeline: Pipeline, padded_batch: int, *, compiled: bool):
        self.layout, self.pipeline, self.padded_batch, self.compiled = layout, pipeline, padded_batch, compiled
        self.blocks = CODE_BYTES[layout.bits] // TILE_K
        self.k_tiles = 8 // layout.bits
        self.groups = 1 if layout.group_size is None else self.k_tiles * TILE_K // layout.group_size
        """Blocks of bytes of a chunk; K-tiles and groups of a block."""

    def add(self, halves: list[Any], count, number, operand_smem):
        """(halves + W x of the next `number` chunks, the new count). `halves` [WGMMA_M, N] in fp32, of a tile; the right
        operands are the K-tiles of `operand_smem`, from its first row on."""
        n = self.padded_batch

        def add_chunk(c, state):
            halves, count = state
            chunk = self.pipeline.take_codes(count)

            def add_block(block, halves):
                first = (c * self.blocks + block) * self.k_tiles
                rights = [operand_smem.at[pl.ds((first + i) * n, n)] for i in range(self.k_tiles)]
                return self._add_block(halves, chunk, block, rights)

            # A loop, for the sake of the instruction cache.
            halves = lax.fori_loop(0, self.blocks, add_block, halves) if self.blocks > 1 else add_block(0, halves)
            self.pipeline.release(count)
            return halves, count + 1

        return lax.fori_loop(0, number, add_chunk, (halves, count))

    def _add_block(self, halves: list[Any], chunk: CodesAndScales, block, rights: list[Any]) -> list[Any]:
        pairs = [(half, group) for half in range(len(halves)) for group in range(self.groups)]

        def multiply(*accs):
            """For each of `pairs`."""
            for half in range(len(halves)):
                for i, left in enumerate(self._left(chunk.codes, half, block)):
                    acc = accs[half * self.groups + i * self.groups // self.k_tiles]
                    plgpu.wgmma(acc, left, rights[i].transpose((1, 0)))
            return [acc[...] for acc in accs]

        def multiply_interpreted():
            """The interpreter multiplies from shared memory only."""
            products = [jnp.zeros(halves[0].shape, jnp.float32) for _ in pairs]
            for half in range(len(halves)):
                for i, left in enumerate(self._left(chunk.codes, half, block)):
                    product = jnp.dot(left, rights[i][...].T, preferred_element_type=jnp.float32)
                    products[half * self.groups + i * self.groups // self.k_tiles] += product
            return products

        acc = plgpu.ACC(halves[0].shape, jnp.float32)
        products = pl.run_scoped(multiply, *[acc] * len(pairs)) if self.compiled else multiply_interpreted()
        halves = list(halves)
        for (half, group), product in zip(pairs, products, strict=True):
            number = 0 if self.layout.group_size is None else block * self.groups + group
            scales = load(chunk.scales.at[number, pl.ds(half * WGMMA_M, WGMMA_M)], ROWS).astype(jnp.float32)
            halves[half] += over_columns(scales, product.shape) * product
        return halves

    def _left(self, codes: Any, half: int, block) -> list[Any]:
        """K-tiles [WGMMA_M, TILE_K] of a block's codes less their offset, in bfloat16."""
        part = codes.at[pl.ds(half * WGMMA_M, WGMMA_M), pl.ds(block * TILE_K, TILE_K)]
        packed = plgpu.load(part, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        return _in_registers(packed, self.layout) if self.compiled else _by_definition(packed, self.layout)


def _by_definition(packed: Any, layout: QuantLayout) -> list[Any]:
    """The same as `_in_registers` for the interpreter, which has no registers."""
    codes = layout.unpack(packed).astype(jnp.int32) - layout.offset
    return jnp.split(codes.astype(jnp.bfloat16), codes.shape[1] // TILE_K, axis=1)


def _in_registers(packed: Any, layout: QuantLayout) -> list[Any]:
    """Bytes [WGMMA_M, TILE_K] → one or two K-tiles of codes less their offset, as the tensor cores take them.

    A thread has four bytes in a row of each 16 columns; the tensor cores want two, and two eight columns later. So it
    changes two of them with its neighbour, as `FragmentedArray.to_layout` does, and then makes bfloat16 of each pair."""
    tile = plgpu.ShapeDtypeStruct((WGMMA_M, TILE_K), jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,), return_type=[tile] * (8 // layout.bits))
    def convert(_, packed):
        i32, wgmma = ir.IntegerType.get_signless(32), fragmented_array.WGMMA_LAYOUT
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        one_word = ir.VectorType.get((1,), i32)
        is_even = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(utils.thread_idx(), utils.c(2, i32)), utils.c(0, i32))
        order = arith.select(is_even, utils.c(0x5410, i32), utils.c(0x3276, i32))
        registers = [
            np.full(wgmma.registers_shape((WGMMA_M, TILE_K)), None, dtype=object) for _ in range(8 // layout.bits)
        ]

        def place(block: int, high: bool) -> tuple[int, int]:
            """(K-tile, block of 16 columns) of the codes in the low or high halves of a block of bytes."""
            if layout.bits == 8:
                return 0, block
            of_half = (layout.group_size or 0) // 32  # blocks of the group's first columns
            group, at = divmod(block, of_half)
            return divmod((2 * group + high) * of_half + at, TILE_K // 16)

        for index, four in np.ndenumerate(packed.registers):
            word = vector.extract(vector.bitcast(one_word, four), [], [0])
            word = utils.prmt(word, utils.shfl_bfly(word, 1), order)
            for high in range(8 // layout.bits):
                some = arith.shrui(word, utils.c(4, i32)) if high else word
                tile_number, block = place(index[1], bool(high))
                for i, places in enumerate(PLACES):
                    constants = [] if layout.bits == 8 else [utils.c(EIGHT_MORE, i32)]
                    code = (BYTES_TO_BF16 if layout.bits == 8 else HALVES_TO_BF16).replace("PLACES", places)
                    (two,) = utils.inline_ptx(code, some, *constants, result_types=(i32,))
                    two = vector.bitcast(pair, vector.broadcast(one_word, two))
                    registers[tile_number][(index[0], 2 * block + i, *index[2:-1])] = two
        return [fragmented_array.FragmentedArray(_registers=r, _layout=wgmma, _is_signed=None) for r in registers]

    return convert(packed)


def codes_shape(stages: int, layout: QuantLayout, stage_bytes: int) -> tuple[int, int, int]:
    """Shape of the stages as bytes: a chunk of codes is the first TILE_M rows of one."""
    size = CODE_BYTES[layout.bits]
    assert TILE_M * size <= stage_bytes
    return stages, stage_bytes // size, size
