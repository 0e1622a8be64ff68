"""SGMM on Ampere and newer in one kernel launch: a Triton kernel through jax-triton.

A program merges a tile [TILE_M, TILE_N] of one layer of one target:

    total = Σ_j c_j · (B[e_j, rows] @ A[e_j, :, columns])        in fp32, TILE_K of the rank at a time
    W[rows, columns] = base[rows, columns] + total               rounded once

The base is asked for first and used last, and A and B are copied to shared memory some products ahead. Programs count
through targets, layers, rows and columns, so those that run together find their A and B in the L2 cache. The kernel
holds the code of every target, and a program branches to its own, in which strides and bounds are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.sgmm.terms import Terms

MAX_TARGETS = 7  # of each the kernel has five parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A tile is [tile_m, tile_n], a product takes tile_k of the rank, and A and B are copied num_stages - 1 products
    ahead."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int


def configure(rank: int, itemsize: int) -> Config:
    """Small enough that programs share a multiprocessor: one computes while another waits for its base."""
    if itemsize == 4:  # products without tensor cores, which take more registers
        return Config(tile_m=64, tile_n=64, tile_k=16, num_warps=8, num_stages=2)
    if rank <= 16:
        return Config(tile_m=64, tile_n=128, tile_k=16, num_warps=4, num_stages=4)
    return Config(tile_m=128, tile_n=64, tile_k=32, num_warps=4, num_stages=3)


def unsupported_reason(weights: dict[str, Array]) -> str | None:
    """The reason why the kernel does not support these shapes, or None."""
    if len(weights) > MAX_TARGETS:
        return f"there are {len(weights)} targets, and one launch takes {MAX_TARGETS}"
    return None


@triton.jit
def _merge_tile(
    base, a, b, w,  # [L, OUT, IN], [L, E, R, IN], [L, E, OUT, R], [L, OUT, IN]
    terms, num_used,
    tile,
    OUT: tl.constexpr, IN: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tiles_m: tl.constexpr = (OUT + TILE_M - 1) // TILE_M
    tiles_n: tl.constexpr = (IN + TILE_N - 1) // TILE_N
    steps: tl.constexpr = (RANK + TILE_K - 1) // TILE_K
    layer = (tile // (tiles_m * tiles_n)).to(tl.int64)
    row, column = tile // tiles_n % tiles_m * TILE_M, tile % tiles_n * TILE_N
    rows, columns, ranks = tl.arange(0, TILE_M)[:, None], tl.arange(0, TILE_N)[None, :], tl.arange(0, TILE_K)
    in_rows, in_columns = (row + rows < OUT) | (OUT % TILE_M == 0), (column + columns < IN) | (IN % TILE_N == 0)
    origin = (layer * OUT + row) * IN + column
    before = tl.load(base + origin + (rows * IN + columns), mask=in_rows & in_columns)

    total = tl.full((TILE_M, TILE_N), 0, tl.float32)
    for step in range(num_used * steps):
        expert, coefficient = 0, 0.0  # by selects from registers: an id loaded here would delay the copies that need it
        for j in tl.static_range(len(terms)):
            here = terms[j][0] == step // steps
            expert, coefficient = tl.where(here, terms[j][1], expert), tl.where(here, terms[j][2], coefficient)
        slab, k = layer * NUM_EXPERTS + expert, step % steps * TILE_K
        in_rank = (k + ranks < RANK) | (RANK % TILE_K == 0)
        b_tile = b + (slab * OUT + row) * RANK + k + (rows * RANK + ranks[None, :])
        a_tile = a + (slab * RANK + k) * IN + column + (ranks[:, None] * IN + columns)
        b_k = tl.load(b_tile, mask=in_rows & in_rank[None, :], other=0)
        a_k = tl.load(a_tile, mask=in_rank[:, None] & in_columns, other=0)
        total += coefficient * tl.dot(b_k, a_k, input_precision="ieee")
    merged = (before.to(tl.float32) + total).to(w.dtype.element_ty)
    tl.store(w + origin + (rows * IN + columns), merged, mask=in_rows & in_columns)


@triton.jit
def _kernel(
    experts, coefficients,  # [NUM_TERMS]
    r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15, r16, r17, r18, r19, r20, r21, r22, r23, r24,
    r25, r26, r27, r28, r29, r30, r31, r32, r33, r34,  # base, A and B of each target; ...; W of each target last
    NUM_REFS: tl.constexpr,
    SEGMENTS: tl.constexpr,  # of each target: first program, number of programs, out, in
    NUM_TERMS: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    refs = (
        r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15, r16, r17, r18, r19, r20, r21, r22, r23,
        r24, r25, r26, r27, r28, r29, r30, r31, r32, r33, r34,
    )  # fmt: skip
    terms, num_used = (), 0  # (place among those used, expert, coefficient) of each
    for j in tl.static_range(NUM_TERMS):
        coefficient = tl.load(coefficients + j)
        used = coefficient != 0
        terms += ((tl.where(used, num_used, -1), tl.load(experts + j), coefficient),)  # type: ignore[assignment]
        num_used += used.to(tl.int32)
    for t in tl.static_range(len(SEGMENTS)):
        tile = tl.program_id(0) - SEGMENTS[t][0]
        if (tile >= 0) & (tile < SEGMENTS[t][1]):
            _merge_tile(
                refs[3 * t], refs[3 * t + 1], refs[3 * t + 2], refs[NUM_REFS - len(SEGMENTS) + t],
                terms, num_used,
                tile,
                SEGMENTS[t][2], SEGMENTS[t][3], NUM_EXPERTS, RANK,
                TILE_M, TILE_N, TILE_K,
            )  # fmt: skip


def sgmm_triton(
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    terms: Terms,
    pristine: dict[str, Array] | None,
    *,
    config: Config | None = None,
) -> dict[str, Array]:
    """See `pallas_kernels.sgmm.sgmm`. Raises `ValueError` with an `unsupported_reason`."""
    from jax_triton import triton_call  # here, because its import fails where JAX has no GPU support

    reason = unsupported_reason(weights)
    if reason is not None:
        raise ValueError(f"sgmm cannot run as triton: {reason}")
    names = sorted(weights)
    _, num_experts, rank, _ = a[names[0]].shape
    config = config or configure(rank, weights[names[0]].dtype.itemsize)

    segments, num_programs = [], 0
    for name in names:
        num_layers, out_dim, in_dim = weights[name].shape
        num_tiles = num_layers * triton.cdiv(out_dim, config.tile_m) * triton.cdiv(in_dim, config.tile_n)
        segments.append((num_programs, num_tiles, out_dim, in_dim))
        num_programs += num_tiles

    base = weights if pristine is None else pristine
    operands = [terms.experts.astype(jnp.int32), terms.coefficients.astype(jnp.float32)]
    operands += [x for name in names for x in (base[name], a[name], b[name])]
    if pristine is None:
        aliases = {2 + 3 * t: t for t in range(len(names))}
    else:
        aliases = {len(operands) + t: t for t in range(len(names))}
        operands += [weights[name] for name in names]
    num_refs = len(operands) - 2 + len(names)
    merged = triton_call(
        *operands,
        kernel=_kernel,
        name="sgmm",
        out_shape=[jax.ShapeDtypeStruct(weights[name].shape, weights[name].dtype) for name in names],
        input_output_aliases=aliases,
        grid=(num_programs,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        NUM_REFS=num_refs,
        SEGMENTS=tuple(segments),
        NUM_TERMS=len(terms.experts),
        NUM_EXPERTS=num_experts,
        RANK=rank,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        TILE_K=config.tile_k,
        **{f"r{i}": None for i in range(num_refs, 5 * MAX_TARGETS)},
    )
    return dict(zip(names, merged, strict=True))
