"""Sizes of tiles, chunks and operands, and what of them fits the shared memory."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantised import QuantLayout

TILE_M, WGMMA_M = 128, 64
"""Rows of a tile of weights, and of what the tensor cores multiply at once."""
TILE_K = 64
"""Columns of a K-tile, and of a chunk [TILE_M, TILE_K] of weights; ranks of an expert that are multiplied at once."""
CODE_BYTES = {8: 128, 4: 64}
"""Bits of a code → bytes of codes of one row in a chunk of quantised weights; both are 128 columns, a head of o's input.
They are multiples of TILE_K, the bytes that are dequantised together."""
MAX_SCALE_BYTES = 4
"""Bytes of a scale, at most."""
WGMMA_N = 8
"""Columns that the tensor cores multiply at least: rows of the batch, or query heads of one key in attention."""
SMEM_BYTES = 227 * 1024
RESERVED_SMEM_BYTES = 3 * 1024
"""Shared memory for barriers and for reductions."""
MAX_SPLIT_K, MAX_STAGES = 16, 13
MAX_WIDE_INPUT_BYTES = 112 * 1024
"""Largest slice of an input that is so wide that no slice of it is smaller. That leaves five stages beside h."""
MIN_STAGES = 2
"""A chunk is released when the next one has come. Attention takes all chunks of a tile together."""


def chunk_k_tiles(layout: QuantLayout | None) -> int:
    """K-tiles of the input that a chunk of weights is multiplied with."""
    return 1 if layout is None else CODE_BYTES[layout.bits] * 8 // layout.bits // TILE_K


def chunk_groups(layout: QuantLayout) -> int:
    """Scales of a row in a chunk of codes; of a layout with one scale for the whole row, that one."""
    return 1 if layout.group_size is None else chunk_k_tiles(layout) * TILE_K // layout.group_size


def padded(batch: int) -> int:
    """N of a batch of at most 32 rows."""
    return next(n for n in (8, 16, 32) if n >= batch)


def smem_rows(k_tiles: int, padded_batch: int) -> int:
    """Rows of `TILE_K` numbers that so many K-tiles of an activation take, as they are loaded: `WGMMA_M` at once."""
    return -(-k_tiles * padded_batch // WGMMA_M) * WGMMA_M


def stored_head_dim(head_dim: int) -> int:
    """Dimensions of a head of q or k in device memory before it is rotated: one of `TILE_K` stands there twice, so that
    what it is rotated with is `TILE_K` numbers in a row."""
    return max(head_dim, 2 * TILE_K)


def min_stages(head_dim: int) -> int:
    """Stages that the pipeline needs."""
    return max(MIN_STAGES, 2 * head_dim // TILE_K)


def stages_beside(rows: int, itemsize: int, smem_bytes: int = SMEM_BYTES, layout: QuantLayout | None = None) -> int:
    """Stages of the pipeline, with the scales of codes, that fit the shared memory beside operands of so many rows."""
    free = smem_bytes - RESERVED_SMEM_BYTES - rows * TILE_K * itemsize
    scales = 0 if layout is None else chunk_groups(layout) * MAX_SCALE_BYTES
    return min(MAX_STAGES, free // (TILE_M * (TILE_K * itemsize + scales)))


def to_k_tiles(x: Float[Array, "N D"]) -> Float[Array, "R K"]:
    """Activations as the kernel reads them: [D / TILE_K · N, TILE_K], K-tile 0 of all rows, then K-tile 1 …, and
    `WGMMA_M` rows more."""
    return jnp.pad(x.reshape(len(x), -1, TILE_K).swapaxes(0, 1).reshape(-1, TILE_K), ((0, WGMMA_M), (0, 0)))


def max_in_dim(batch: int, itemsize: int = 2, layout: QuantLayout | None = None) -> int:
    """The widest input whose slices, of whole chunks, fit the shared memory."""
    columns = TILE_K * chunk_k_tiles(layout)
    return MAX_SPLIT_K * (MAX_WIDE_INPUT_BYTES // (padded(batch) * itemsize) // columns * columns)
