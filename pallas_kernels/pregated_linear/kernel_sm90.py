"""Pre-gated linears on Hopper in one kernel launch: a group of linears of the megakernel (`pallas_kernels.megakernel.gemm`).

y = W x + Σ_u B[e_u] g_u A[e_u] x        rounded once
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.megakernel.buffers import Buffers, partial_sums
from pallas_kernels.megakernel.gemm import Gemm, steps_of
from pallas_kernels.megakernel.kernel_sm90 import COMPILER_PARAMS
from pallas_kernels.megakernel.mixture import Mixture, used_first
from pallas_kernels.megakernel.pipeline import Pipeline
from pallas_kernels.megakernel.plan import (
    MIN_STAGES,
    TILE_K,
    TILE_M,
    WGMMA_M,
    Group,
    h_smem_rows,
    make_group,
    max_in_dim,
    no_smem_reason,
    padded,
    smem_rows,
    stages_beside,
    to_k_tiles,
)
from pallas_kernels.megakernel.register_tiles import store_transposed
from pallas_kernels.megakernel.schedule import Scalars

MAX_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """The fields of the megakernel's `Plan` that a group reads."""

    padded_batch: int
    is_batch_one: bool
    num_ctas: int
    rank_tiles: int
    max_rank_tiles: int
    h_rank_tiles: int
    x_smem_rows: int


@dataclass(frozen=True)
class StoreOutput:
    """`y` [N, out] by linear, rounded to its type."""

    y: dict[str, Any]

    def __call__(self, layer, names, row, columns):
        return partial(store_transposed, self.y[names[0]].at[columns, pl.ds(row, WGMMA_M)])


def unsupported_reason(x: Array, weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    """The reason why these shapes cannot run here, or None."""
    if x.dtype.itemsize != 2:
        return f"x is {x.dtype}, and the tensor cores multiply bfloat16 and float16"
    if len(x) > MAX_BATCH:
        return f"{len(x)} rows come together, and it takes {MAX_BATCH} at most"
    if x.shape[1] > max_in_dim(len(x)):
        return f"x has {x.shape[1]} columns, and with {len(x)} rows it takes {max_in_dim(len(x))} at most"
    for name, w in weights.items():
        if w.shape[1] % WGMMA_M or w.shape[2] % TILE_K:
            return f"{name} is [{w.shape[1]}, {w.shape[2]}], and it takes multiples of 64"
    for name, factor in a.items():
        if factor.shape[2] % TILE_K:
            return f"{name} has rank {factor.shape[2]}, and it takes multiples of {TILE_K}"
    return None


def _kernel(
    *refs,
    names,
    plan,
    group: Group,
    steps,
    compiled,
    stages_smem,
    stage_full,
    stage_full_second_half,
    stage_empty,
    operand_smem,
):
    """`steps`: those that this launch does."""
    outputs = {name[1]: ref for name, ref in zip(names, refs, strict=True) if name[0] == "y"}
    (layer_ref,) = (ref for name, ref in zip(names, refs, strict=True) if name == ("layer",))
    inputs = [(name, ref) for name, ref in zip(names, refs, strict=True) if name[0] not in ("y", "layer")]
    buffers = Buffers.of(*zip(*inputs, strict=True))
    scalars = Scalars.load(buffers.experts, buffers.num_used, None)
    pipeline = Pipeline(stages_smem, stage_full, stage_empty, stage_full_second_half)
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((group.num_semaphores,))) if compiled else None
    gemm = Gemm(
        group, plan, buffers, scalars, pipeline, semaphores, steps=steps, store=StoreOutput(outputs), norm_dim=None,
        eps=0.0, turn=lambda layer: 0,
    )  # fmt: skip
    layer = layer_ref[0]

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _copy():
        gemm.copy(layer, pipeline.start())

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _compute():
        gemm.compute(layer, jnp.int32(0), buffers.x, operand_smem)


def pregated_linear_sm90(
    x: Float[Array, "B in"],
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    layer: int | Int[Array, ""],
    *,
    interpret: Any = False,
    num_ctas: int | None = None,
) -> dict[str, Array]:
    """See `pallas_kernels.pregated_linear.pregated_linear`. `num_ctas` thread blocks run (default: one on each
    multiprocessor); interpreted on the CPU, each step is a launch. Raises `ValueError` with an `unsupported_reason`."""
    reason = unsupported_reason(x, weights, a)
    if reason is not None:
        raise ValueError(f"pregated_linear cannot run as pallas: {reason}")
    batch, dtype, itemsize = len(x), x.dtype, x.dtype.itemsize
    padded_batch, ctas = padded(batch), num_ctas or jax.devices()[0].core_count
    shapes = {name: (w.shape[1], w.shape[2]) for name, w in weights.items()}
    inputs: dict[tuple[str, ...], Any] = {
        ("x",): to_k_tiles(jnp.pad(x, ((0, padded_batch - batch), (0, 0)))),
        ("layer",): jnp.int32(layer)[None],
    }
    max_experts_used, rank_tiles = 1, 1
    if mixture is not None and a:
        max_experts_used, rank_tiles = len(mixture.experts), next(iter(a.values())).shape[2] // TILE_K
        mixture, num_used = used_first(mixture)
        inputs |= {("experts",): mixture.experts, ("num_used",): num_used}
        inputs["gates",] = jnp.pad(mixture.gates, ((0, 0), (0, padded_batch - batch)))
    max_rank_tiles = max_experts_used * rank_tiles
    group = make_group(
        shapes, tuple((name,) for name in shapes), tuple(a), max_rank_tiles=max_rank_tiles, num_ctas=ctas,
        padded_batch=padded_batch, itemsize=itemsize, is_batch_one=batch == 1,
    )  # fmt: skip
    plan = LinearPlan(
        is_batch_one=batch == 1, padded_batch=padded_batch, rank_tiles=rank_tiles, max_rank_tiles=max_rank_tiles,
        h_rank_tiles=max_rank_tiles,
        num_ctas=ctas, x_smem_rows=smem_rows(group.max_slice_chunks, padded_batch),
    )  # fmt: skip
    inputs |= {(kind, name): w for kind, of in (("weights", weights), ("a", a), ("b", b)) for name, w in of.items()}
    scratch: dict[tuple[str, ...], Any] = {(k,): v for k, v in partial_sums([group], plan, dtype).items()}
    scratch |= {("y", name): ((padded_batch, out), dtype) for name, (out, _) in shapes.items()}
    refs = dict(inputs)
    for name, (of_shape, of_type) in scratch.items():
        if interpret is False:
            refs[name] = jax.empty_ref(jax.ShapeDtypeStruct(of_shape, of_type))
        else:  # what is read before it is written shows
            refs[name] = jax.new_ref(jnp.full(of_shape, jnp.nan, of_type))

    def operand(*shape: int):
        width = plgpu.find_swizzle(TILE_K * itemsize * 8)
        tiling = plgpu.TilingTransform((8, width // itemsize))  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(width)))  # type: ignore[abstract]

    h_rows = h_smem_rows([group], max_rank_tiles, padded_batch, plan.is_batch_one)
    stages = stages_beside(plan.x_smem_rows + h_rows, itemsize)
    if stages < MIN_STAGES:
        reason = no_smem_reason(max_experts_used, TILE_K * rank_tiles, batch)
        raise ValueError(f"pregated_linear cannot run as pallas: {reason}")
    steps = steps_of(group, plan.is_batch_one)
    for these in (steps,) if interpret is False else zip(steps):
        plgpu.kernel(
            partial(_kernel, names=tuple(refs), plan=plan, group=group, steps=these, compiled=interpret is False),
            out_type=(),
            grid=(ctas,),
            grid_names=("cta",),
            num_threads=2,
            thread_name="warpgroup",
            scratch_types={
                "stages_smem": operand(stages, TILE_M, TILE_K),
                "stage_full": plgpu.Barrier(num_barriers=stages),
                "stage_full_second_half": plgpu.Barrier(num_barriers=stages),
                "stage_empty": plgpu.Barrier(num_barriers=stages),
                "operand_smem": operand(plan.x_smem_rows + h_rows, TILE_K),
            },
            compiler_params=COMPILER_PARAMS,
            interpret=interpret,
        )(*refs.values())
    return {name: jax.freeze(refs["y", name])[:batch] for name in weights}
