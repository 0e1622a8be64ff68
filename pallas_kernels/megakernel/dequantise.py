"""Products with quantised weights, whose codes are dequantised between shared memory and the tensor cores.

    y = Σ_g s_g ∘ ((C_g − 2^(bits−1)) x_g)        over the groups g of columns that share a scale

A code less its offset is exact in bfloat16, so the tensor cores multiply it from registers, and the scale multiplies what
they find of a group, in fp32: W is never rounded. Codes have one byte or half of one (`pallas_kernels.quantised`); a group
of 4 bits has the codes of its first half of columns in the low halves of its bytes, those of the second in the high ones.

Thread t of four loads four bytes in a row, from column c = (0, 8, 4, 12)[t] of 16 on, where the tensor cores want columns
2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of it. A product does not change when the columns of both operands change places, so bytes
stay with their thread and x's columns move instead, once for each input (`move_columns`).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from pallas_kernels.megakernel.pipeline import CodesAndScales, Pipeline
from pallas_kernels.megakernel.register_tiles import ROWS, load, over_columns, store
from pallas_kernels.megakernel.sizes import CODE_BYTES, TILE_K, TILE_M, WGMMA_M
from pallas_kernels.quantised import QuantLayout

BYTES_TO_BF16 = """{
    .reg .b32 low, high;
    lop3.b32 low, $1, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 high, $1, 0x00800080, 0x43804380, 0x6a;
    sub.bf16x2 $0, low, high;
}"""
"""Bytes 0 and 2 of $1, less 128: their last 7 bits on top of a bfloat16 of 128 (lop3 is (a & b) | c), less 256, or 128 if
the first bit is set (lop3 is (a & b) ^ c)."""
HALVES_TO_BF16 = """{
    .reg .b32 both;
    lop3.b32 both, $1, 0x000f000f, 0x43004300, 0xea;
    sub.bf16x2 $0, both, $2;
}"""
"""The low halves of bytes 0 and 2 of $1, less 8: on top of a bfloat16 of 128, less $2."""
EIGHT_MORE = 0x43084308
"""136 in bfloat16, twice."""
PAIRS = (0, 2), (1, 3)
"""Bytes of a thread, or numbers of x, that go to its first and to its second pair of columns."""


class QuantisedProduct:
    """Tiles of quantised weights times the input, chunk by chunk, and of a chunk TILE_K bytes of every row at once."""

    def __init__(self, layout: QuantLayout, pipeline: Pipeline, padded_batch: int, *, compiled: bool):
        self.layout, self.pipeline, self.padded_batch, self.compiled = layout, pipeline, padded_batch, compiled
        self.blocks = CODE_BYTES[layout.bits] // TILE_K
        self.k_tiles = 8 // layout.bits
        self.groups = 1 if layout.group_size is None else self.k_tiles * TILE_K // layout.group_size
        """Blocks of bytes of a chunk; K-tiles and groups of a block."""

    def finish(self, accs, count, number, operand_smem):
        """(The halves [WGMMA_M, N] in fp32 of a tile: W x of the next `number` chunks, or `accs` if there are none; the new
        count.) The right operands are the K-tiles of `operand_smem`, from its first row on, after `move_columns`.

        While the tensor cores multiply one half of a block, the codes of the other become their operands."""
        if not self.compiled:
            return self._finish_interpreted(accs, count, number, operand_smem)
        if self.layout.group_size is None:
            return self._finish_rows(accs, count, number, operand_smem)
        return self._finish_groups(accs, count, number, operand_smem)

    def _finish_rows(self, accs, count, number, operand_smem):
        """Sums of all chunks, times the scales of the rows, which every chunk brings along."""

        def add_chunk(c, state):
            _, count = state
            chunk = self.pipeline.take_codes(count)

            def add_block(block, _):
                (right,) = self._rights(operand_smem, c * self.blocks + block)
                for half, acc in enumerate(accs):
                    (left,) = self._lefts(chunk.codes, half, block)
                    plgpu.wgmma(acc, left, right.transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # so that the other half's registers are free

            lax.fori_loop(0, self.blocks, add_block, None)
            scales = [self._scales(chunk, half, 0) for half in (0, 1)]
            self.pipeline.release(count)
            return scales, count + 1

        ones = plgpu.layout_cast(jnp.ones(WGMMA_M, jnp.float32), ROWS)
        scales, count = lax.fori_loop(0, number, add_chunk, ([ones, ones], count))
        return [acc[...] * over_columns(s, acc.shape) for acc, s in zip(accs, scales, strict=True)], count

    def _finish_groups(self, accs, count, number, operand_smem):
        """Sums of each group of columns, times its scales. The sums of a block are awaited before the next: where they are
        still to come when the other accumulators are in use, the compiler waits for every product by itself."""
        acc = plgpu.ACC(accs[0].shape, jnp.float32)

        def add_block(halves, chunk, block, rights):
            def multiply(*accs):
                """For each half and group."""
                for half in (0, 1):
                    for i, left in enumerate(self._lefts(chunk.codes, half, block)):
                        acc = accs[half * self.groups + i * self.groups // self.k_tiles]
                        plgpu.wgmma(acc, left, rights[i].transpose((1, 0)))
                return [acc[...] for acc in accs]

            sums, halves = pl.run_scoped(multiply, *[acc] * (2 * self.groups)), [*halves]
            for (half, group), y in zip(product((0, 1), range(self.groups)), sums, strict=True):
                halves[half] += over_columns(self._scales(chunk, half, block * self.groups + group), y.shape) * y
            return halves

        def add_chunk(c, state):
            halves, count = state
            chunk = self.pipeline.take_codes(count)
            for block in range(self.blocks):
                halves = add_block(halves, chunk, block, self._rights(operand_smem, c * self.blocks + block))
            self.pipeline.release(count)
            return halves, count + 1

        return lax.fori_loop(0, number, add_chunk, ([acc[...] for acc in accs], count))

    def _finish_interpreted(self, accs, count, number, operand_smem):
        """The interpreter's tensor cores take no operand from registers."""

        def add_chunk(c, state):
            halves, count = state
            halves, chunk = [*halves], self.pipeline.take_codes(count)
            for block, half in product(range(self.blocks), (0, 1)):
                rights = self._rights(operand_smem, c * self.blocks + block)
                for i, left in enumerate(self._lefts(chunk.codes, half, block)):
                    y = jnp.dot(left, rights[i][...].T, preferred_element_type=jnp.float32)
                    halves[half] += over_columns(self._scales(chunk, half, self._group(block, i)), y.shape) * y
            self.pipeline.release(count)
            return halves, count + 1

        return lax.fori_loop(0, number, add_chunk, ([acc[...] for acc in accs], count))

    def _rights(self, operand_smem, block) -> list[Any]:
        n = self.padded_batch
        return [operand_smem.at[pl.ds((block * self.k_tiles + i) * n, n)] for i in range(self.k_tiles)]

    def _group(self, block: int, k_tile: int) -> int:
        """Number of the scales of a block's K-tile, among those of the chunk."""
        return 0 if self.layout.group_size is None else block * self.groups + k_tile * self.groups // self.k_tiles

    def _scales(self, chunk: CodesAndScales, half: int, group: int):
        return load(chunk.scales.at[group, pl.ds(half * WGMMA_M, WGMMA_M)], ROWS).astype(jnp.float32)

    def _lefts(self, codes: Any, half: int, block) -> list[Any]:
        """K-tiles [WGMMA_M, TILE_K] of a block's codes less their offset, in bfloat16, their columns moved."""
        part = codes.at[pl.ds(half * WGMMA_M, WGMMA_M), pl.ds(block * TILE_K, TILE_K)]
        packed = plgpu.load(part, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        return _in_registers(packed, self.layout) if self.compiled else _by_definition(packed, self.layout)

    def move_columns(self, operand_smem, rows: int):
        """Move the columns of the first `rows` rows of the right operand, a multiple of WGMMA_M, as those of codes."""

        def move(i, _):
            place = operand_smem.at[pl.ds(i * WGMMA_M, WGMMA_M)]
            tile = load(place, plgpu.Layout.WGMMA_UPCAST_2X)
            plgpu.commit_smem()  # all have loaded theirs
            store(place, _moved_registers(tile) if self.compiled else _moved(tile))

        lax.fori_loop(0, rows // WGMMA_M, move, None)
        plgpu.commit_smem()


def _moved(x: jax.Array) -> jax.Array:
    """Columns c, c + 2, c + 1 and c + 3 of each 16, c = (0, 8, 4, 12)[t], in places 2 t, 2 t + 1, 2 t + 8 and 2 t + 9."""
    rows = x.shape[0]
    return x.reshape(rows, -1, 2, 2, 2, 2).transpose(0, 1, 5, 3, 2, 4).reshape(rows, -1)


def _moved_registers(tile: Any) -> Any:
    """The same as `_moved`: numbers stay in their thread."""
    moved = plgpu.ShapeDtypeStruct((WGMMA_M, TILE_K), jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,), return_type=moved)
    def move(_, tile):
        two = ir.VectorType.get((2,), ir.BF16Type.get())
        found = _no_registers()
        for index, four in np.ndenumerate(tile.registers):
            for i, pair in enumerate(PAIRS):
                numbers = [vector.extract(four, [], [place]) for place in pair]
                found[(index[0], 2 * index[1] + i, *index[2:-1])] = vector.from_elements(two, numbers)
        return _wgmma_array(found)

    return move(tile)


def _by_definition(packed: Any, layout: QuantLayout) -> list[Any]:
    """The same as `_in_registers` for the interpreter, which has no registers."""
    codes = layout.unpack(packed).astype(jnp.int32) - layout.offset
    return jnp.split(_moved(codes.astype(jnp.bfloat16)), codes.shape[1] // TILE_K, axis=1)


def _in_registers(packed: Any, layout: QuantLayout) -> list[Any]:
    """Bytes [WGMMA_M, TILE_K] → one or two K-tiles of codes less their offset, their columns moved."""
    tile = plgpu.ShapeDtypeStruct((WGMMA_M, TILE_K), jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,), return_type=[tile] * (8 // layout.bits))
    def convert(_, packed):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        one_word = ir.VectorType.get((1,), i32)
        registers = [_no_registers() for _ in range(8 // layout.bits)]

        def place(block: int, high: bool) -> tuple[int, int]:
            """(K-tile, block of 16 columns) of the codes in the low or high halves of a block of bytes."""
            if layout.bits == 8:
                return 0, block
            of_half = (layout.group_size or 0) // 32  # blocks of the group's first columns
            group, at = divmod(block, of_half)
            return divmod((2 * group + high) * of_half + at, TILE_K // 16)

        for index, four in np.ndenumerate(packed.registers):
            word = vector.extract(vector.bitcast(one_word, four), [], [0])
            for high in range(8 // layout.bits):
                tile_number, block = place(index[1], bool(high))
                for i, (first, _) in enumerate(PAIRS):
                    bits = 8 * first + 4 * high
                    some = arith.shrui(word, utils.c(bits, i32)) if bits else word
                    constants = [] if layout.bits == 8 else [utils.c(EIGHT_MORE, i32)]
                    code = BYTES_TO_BF16 if layout.bits == 8 else HALVES_TO_BF16
                    (two,) = utils.inline_ptx(code, some, *constants, result_types=(i32,))
                    two = vector.bitcast(pair, vector.broadcast(one_word, two))
                    registers[tile_number][(index[0], 2 * block + i, *index[2:-1])] = two
        return [_wgmma_array(r) for r in registers]

    return convert(packed)


def _no_registers() -> np.ndarray:
    return np.full(fragmented_array.WGMMA_LAYOUT.registers_shape((WGMMA_M, TILE_K)), None, dtype=object)


def _wgmma_array(registers: np.ndarray) -> fragmented_array.FragmentedArray:
    layout = fragmented_array.WGMMA_LAYOUT
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def codes_shape(stages: int, layout: QuantLayout, stage_bytes: int) -> tuple[int, int, int]:
    """Shape of the stages as bytes: a chunk of codes is the first TILE_M rows of one."""
    size = CODE_BYTES[layout.bits]
    assert TILE_M * size <= stage_bytes
    return stages, stage_bytes // size, size
