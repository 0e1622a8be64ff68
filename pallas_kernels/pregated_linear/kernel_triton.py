"""The pre-gated linear on Ampere and newer in one kernel launch: a Triton kernel through jax-triton.

Every program multiplies TILE_M rows of one matrix by x, TILE_K columns at a time, in fp32. The first programs shrink: their
matrices are the A of the experts in use, and they publish

    t[target, b, u, r] = round(g[u, b] · (A[l, e_u] x[b])[r])        and count themselves as ready

The others have rows of some W, and add B[l, e_u] t[b, u] to them at the end, when t has long been stored. Should it not be,
they wait: programs start in the order of their ids, and those that shrink come first and wait for nothing.

One row is multiplied with fp32 FMA; several, padded to 16 or 32, on tensor cores. The kernel holds the code of every target,
and a program branches to its own, in which strides and bounds are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.megakernel.mixture import Mixture

MAX_TARGETS = 4  # of each the kernel has four parameters
MAX_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A program has tile_m rows, and takes tile_k columns of W or A at a time and tile_r of B."""

    tile_m: int
    tile_k: int
    tile_r: int
    num_warps: int
    num_stages: int


def configure(batch: int, rank: int, itemsize: int) -> Config:
    """Rows few enough that a small linear fills the GPU, columns enough that loads are long."""
    tile_r = max(16, min(64, triton.next_power_of_2(rank)))
    if batch == 1:
        return Config(tile_m=8, tile_k=1024 // itemsize, tile_r=tile_r, num_warps=4, num_stages=1)
    if itemsize == 4:  # products without tensor cores, which take more registers
        return Config(tile_m=32, tile_k=32, tile_r=16, num_warps=4, num_stages=3)
    return Config(tile_m=32, tile_k=128, tile_r=tile_r, num_warps=4, num_stages=4)


def unsupported_reason(x: Array, weights: dict[str, Array]) -> str | None:
    """The reason why the kernel does not support these shapes, or None."""
    if len(weights) > MAX_TARGETS:
        return f"there are {len(weights)} targets, and one launch takes {MAX_TARGETS}"
    if x.shape[0] > MAX_BATCH:
        return f"there are {x.shape[0]} rows, and a program takes {MAX_BATCH}"
    return None


@triton.jit
def _times_x(
    rows, in_rows,  # [TILE_M, 1] pointers to the rows of a matrix, and which of them are valid
    x,  # [BATCH, IN]
    IN: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """[TILE_M, COLUMNS]; the columns from BATCH on are 0."""
    columns = tl.arange(0, COLUMNS)[None, :]
    total = tl.full((TILE_M, TILE_K if COLUMNS == 1 else COLUMNS), 0, tl.float32)
    for start in range(0, IN, TILE_K):
        k = start + tl.arange(0, TILE_K)
        inside = (k < IN) | (IN % TILE_K == 0)
        m_k = tl.load(rows + k[None, :], mask=in_rows & inside[None, :], other=0)
        if COLUMNS == 1:
            x_k = tl.load(x + k, mask=inside, other=0)
            total += m_k.to(tl.float32) * x_k.to(tl.float32)[None, :]
        else:
            x_k = tl.load(x + (columns * IN + k[:, None]), mask=(columns < BATCH) & inside[:, None], other=0)
            total = tl.dot(m_k, x_k, total, input_precision="ieee")
    if COLUMNS == 1:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def _is_used(gates, u, BATCH: tl.constexpr, COLUMNS: tl.constexpr):
    """True if some row of the batch uses expert u; nothing is read of an expert that none uses."""
    columns = tl.arange(0, COLUMNS)
    gate = tl.load(gates + u * BATCH + columns, mask=columns < BATCH, other=0)
    return tl.sum((gate != 0).to(tl.int32), axis=0) > 0


@triton.jit
def _shrink(
    x, a, t,  # [BATCH, IN], [L, E, R, IN], [BATCH, NUM_USED, R]
    experts, gates, layer,
    tile,
    IN: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr,
    NUM_USED: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (RANK + TILE_M - 1) // TILE_M
    u, r = tile // tiles, tile % tiles * TILE_M + tl.arange(0, TILE_M)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    gate = tl.load(gates + u * BATCH + columns, mask=columns < BATCH, other=0)
    slab = layer * NUM_EXPERTS + tl.load(experts + u)
    in_rows = (r < RANK) & _is_used(gates, u, BATCH, COLUMNS)
    product = _times_x(a + (slab * RANK + r) * IN, in_rows, x, IN, BATCH, COLUMNS, TILE_M, TILE_K)
    gated = tl.where(gate != 0, product * gate, 0).to(t.dtype.element_ty)
    tl.store(t + ((columns * NUM_USED + u) * RANK + r), gated, mask=(r < RANK) & (columns < BATCH))


@triton.jit
def _load_b(
    b, experts, gates, layer, row, in_rows, step,
    OUT: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    TILE_R: tl.constexpr,
):  # fmt: skip
    """[TILE_M, TILE_R] of one expert; 0 if it is not used."""
    steps: tl.constexpr = (RANK + TILE_R - 1) // TILE_R
    u, r = step // steps, step % steps * TILE_R + tl.arange(0, TILE_R)[None, :]
    slab = layer * NUM_EXPERTS + tl.load(experts + u)
    is_valid = in_rows & (r < RANK) & _is_used(gates, u, BATCH, COLUMNS)
    return tl.load(b + ((slab * OUT + row) * RANK + r), mask=is_valid, other=0)


@triton.jit
def _linear(
    x, w, b, y, t, ready,  # [BATCH, IN], [L, OUT, IN], [L, E, OUT, R], [BATCH, OUT], [BATCH, NUM_USED, R], [1]
    experts, gates, layer,
    tile,
    ADAPTED: tl.constexpr, NUM_SHRINK: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr,
    NUM_USED: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    steps: tl.constexpr = (RANK + TILE_R - 1) // TILE_R
    row, columns = tile * TILE_M + tl.arange(0, TILE_M)[:, None], tl.arange(0, COLUMNS)[None, :]
    in_rows = (row < OUT) | (OUT % TILE_M == 0)
    b_tiles = ()
    if ADAPTED and COLUMNS == 1:  # asked for first, used last
        for step in tl.static_range(NUM_USED * steps):
            b_k = _load_b(
                b, experts, gates, layer, row, in_rows, step, OUT, BATCH, COLUMNS, NUM_EXPERTS, RANK, TILE_R
            )  # fmt: skip
            b_tiles += (b_k,)  # type: ignore[assignment]
    total = _times_x(w + (layer * OUT + row) * IN, in_rows, x, IN, BATCH, COLUMNS, TILE_M, TILE_K)
    if ADAPTED:
        while tl.atomic_add(ready, 0, sem="acquire") < NUM_SHRINK:
            pass
        tl.debug_barrier()
        ranks = tl.arange(0, TILE_R)
        if COLUMNS == 1:
            added = tl.full((TILE_M, TILE_R), 0, tl.float32)
            for step in tl.static_range(NUM_USED * steps):
                r = step % steps * TILE_R + ranks
                t_k = tl.load(t + step // steps * RANK + r, mask=r < RANK, other=0)
                added += b_tiles[step].to(tl.float32) * t_k.to(tl.float32)[None, :]
            total += tl.sum(added, axis=1, keep_dims=True)
        else:
            for step in range(NUM_USED * steps):
                b_k = _load_b(
                    b, experts, gates, layer, row, in_rows, step, OUT, BATCH, COLUMNS, NUM_EXPERTS, RANK, TILE_R
                )  # fmt: skip
                r = (step % steps * TILE_R + ranks)[:, None]
                t_rows = t + (columns * NUM_USED + step // steps) * RANK
                t_k = tl.load(t_rows + r, mask=(r < RANK) & (columns < BATCH), other=0)
                total = tl.dot(b_k, t_k, total, input_precision="ieee")
    tl.store(y + (columns * OUT + row), total.to(y.dtype.element_ty), mask=in_rows & (columns < BATCH))


@triton.jit
def _kernel(
    layer, experts, gates, x,  # [1], [NUM_USED], [NUM_USED, BATCH], [BATCH, IN]
    r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15,
    r16, r17,  # W, A and B of each target; y of each; t [targets, BATCH, NUM_USED, R] and the number of programs ready
    SEGMENTS: tl.constexpr,  # of each target: first program and number of programs that shrink, the same of the others,
    NUM_SHRINK: tl.constexpr,  # and out
    IN: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr,
    NUM_USED: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    refs = (r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15, r16, r17)
    num_targets: tl.constexpr = len(SEGMENTS)
    program, layer_id = tl.program_id(0), tl.load(layer).to(tl.int64)
    t_size: tl.constexpr = BATCH * NUM_USED * RANK
    t, ready = refs[4 * num_targets], refs[4 * num_targets + 1]
    if program < NUM_SHRINK:
        for i in tl.static_range(num_targets):
            tile = program - SEGMENTS[i][0]
            if (tile >= 0) & (tile < SEGMENTS[i][1]):
                _shrink(
                    x, refs[3 * i + 1], t + i * t_size, experts, gates, layer_id, tile,
                    IN, BATCH, COLUMNS, NUM_USED, NUM_EXPERTS, RANK, TILE_M, TILE_K,
                )  # fmt: skip
        tl.debug_barrier()  # all of t is stored before it counts
        tl.atomic_add(ready, 1, sem="release")
    for i in tl.static_range(num_targets):
        tile = program - SEGMENTS[i][2]
        if (tile >= 0) & (tile < SEGMENTS[i][3]):
            _linear(
                x, refs[3 * i], refs[3 * i + 2], refs[3 * num_targets + i], t + i * t_size, ready,
                experts, gates, layer_id, tile, SEGMENTS[i][1] > 0, NUM_SHRINK,
                IN, SEGMENTS[i][4], BATCH, COLUMNS, NUM_USED, NUM_EXPERTS, RANK, TILE_M, TILE_K, TILE_R,
            )  # fmt: skip


def pregated_linear_triton(
    x: Array,
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    layer: int | Array,
    *,
    config: Config | None = None,
) -> dict[str, Array]:
    """See `pallas_kernels.pregated_linear.pregated_linear`. Raises `ValueError` with an `unsupported_reason`."""
    from jax_triton import triton_call  # here, because its import fails where JAX has no GPU support

    reason = unsupported_reason(x, weights)
    if reason is not None:
        raise ValueError(f"pregated_linear cannot run as triton: {reason}")
    names, batch = list(weights), x.shape[0]
    _, num_experts, rank, _ = next(iter(a.values())).shape if a else (0, 1, 1, 0)
    if mixture is None:
        mixture = Mixture(jnp.zeros(1, jnp.int32), jnp.zeros((1, batch), jnp.float32))
    num_used = len(mixture.experts)
    config = config or configure(batch, rank, x.dtype.itemsize)

    tiles_of_a = num_used * triton.cdiv(rank, config.tile_m)
    num_shrink = tiles_of_a * len(a)
    segments, first, program = [], 0, num_shrink
    for name in names:
        shrink, tiles = tiles_of_a if name in a else 0, triton.cdiv(weights[name].shape[1], config.tile_m)
        segments.append((first, shrink, program, tiles, weights[name].shape[1]))
        first, program = first + shrink, program + tiles

    operands = [jnp.asarray(layer, jnp.int32).reshape(1)]
    operands += [mixture.experts.astype(jnp.int32), mixture.gates.astype(jnp.float32), x]
    for name in names:
        w = weights[name]
        operands += [w, a.get(name, w), b.get(name, w)]
    outputs = [jax.ShapeDtypeStruct((batch, weights[name].shape[1]), x.dtype) for name in names]
    workspace = [
        jax.ShapeDtypeStruct((len(names), batch, num_used, rank), x.dtype),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    ys = triton_call(
        *operands,
        kernel=_kernel,
        name="pregated_linear",
        out_shape=[*outputs, *workspace],
        zeroed_outputs=(len(names) + 1,),
        grid=(program,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        SEGMENTS=tuple(segments),
        NUM_SHRINK=num_shrink,
        IN=x.shape[1],
        BATCH=batch,
        COLUMNS=1 if batch == 1 else max(16, triton.next_power_of_2(batch)),
        NUM_USED=num_used,
        NUM_EXPERTS=num_experts,
        RANK=rank,
        TILE_M=config.tile_m,
        TILE_K=config.tile_k,
        TILE_R=config.tile_r,
        **{f"r{i}": None for i in range(4 * len(names) + 2, 4 * MAX_TARGETS + 2)},
    )
    return dict(zip(names, ys[: len(names)], strict=True))
