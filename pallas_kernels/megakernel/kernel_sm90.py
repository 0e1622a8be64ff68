"""One decoding step of the whole model in one kernel launch, on Hopper: one CTA on each multiprocessor, in phases.

    for every layer:   q, k, v   attention   o   gate, up   down          then the head

A phase needs what all CTAs have stored in the one before, so there is a grid barrier between them; the weights need
nothing, so a producer warpgroup of every CTA copies them into shared memory without ever waiting for a barrier, as far
ahead as the stages of the SMEM pipeline allow. While the consumer warpgroup waits for other CTAs, the device memory goes
on working.

    phase        reads                            writes
    q, k, v      the norm of x                    q, k, v                                        (gemm.py, epilogue.py)
    attention    q, k, v, the cache               the context                                    (attention.py)
    o, down      the context, the hidden          x + y, its norm
    gate, up     the norm of x                    act(gate) · up
    head         the norm of x                    logits

If the plan has fused attention, there is no phase for it: o's begins with it. Where what o and down add has a norm, each
has one more phase, which adds it (output_norm.py).

Several devices run it together on their shards of the model: then o and down are all-reduced (all_reduce.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.all_reduce import AllReduce
from pallas_kernels.megakernel.attention import Attention
from pallas_kernels.megakernel.buffers import Buffers, scratch_and_outputs
from pallas_kernels.megakernel.dequantise import codes_shape
from pallas_kernels.megakernel.epilogue import AddResidual, GatedProduct, Store, StoreHeads, StoreLogits
from pallas_kernels.megakernel.gemm import Gemm, steps_of
from pallas_kernels.megakernel.l2_hints import EVICT_LAST, EVICT_NORMAL, partial_sums_of_layers, resident, set_priority
from pallas_kernels.megakernel.output_norm import OutputNorm, StoreOutput
from pallas_kernels.megakernel.pipeline import Pipeline
from pallas_kernels.megakernel.plan import Group, Plan, Profile
from pallas_kernels.megakernel.polling import mark_not_stored
from pallas_kernels.megakernel.schedule import Scalars
from pallas_kernels.megakernel.sizes import TILE_K, TILE_M, WGMMA_N, chunk_groups

COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
"""Lowering with explicit layouts, as inferring them takes most of the time to compile."""


@dataclass(slots=True, kw_only=True)
class SharedMemory:
    """The refs of a CTA: the pipeline's stages and barriers, and the right operands of linears or of attention."""

    stages_smem: Any  # [stages, TILE_M, TILE_K]
    codes_smem: Any = None  # the same place in bytes, [stages, TILE_M or more, CODE_BYTES]
    scales_smem: Any = None  # [stages, groups of a chunk, TILE_M]
    stage_full: Any
    stage_full_second_half: Any
    stage_empty: Any
    operand_smem: Any  # [x_smem_rows + h_smem_rows, TILE_K]
    q_smem: Any  # [H / TILE_K, WGMMA_N, TILE_K]
    p_smem: Any  # [TILE_M / TILE_K, WGMMA_N, TILE_K]

    @classmethod
    def of(cls, *, operands: Any = None, stages: Any = None, **refs: Any) -> SharedMemory:
        if stages is not None:
            (refs["stages_smem"],), (refs["codes_smem"],) = stages
        if operands is not None:
            (refs["operand_smem"],), (refs["q_smem"], refs["p_smem"]) = operands
        return cls(**refs)


@dataclass(frozen=True)
class Phase:
    """`copy(layer, state)` fills the pipeline, `compute(layer, count)` empties it; both return how far they are."""

    copy: Callable[[Any, Any], Any]
    compute: Callable[[Any, Any], Any]


def _phases(
    plan: Plan,
    buffers: Buffers,
    smem: SharedMemory,
    scalars: Scalars,
    pipeline: Pipeline,
    semaphores: Any,
    all_reduce: AllReduce | None,
    model: Any,
    compiled: bool,
) -> tuple[list[Phase], list[Phase]]:
    """(of a layer, after the last layer)."""
    embed_dim, eps = model.embed_dim, model.norm_eps
    attention = Attention(plan, buffers, scalars, pipeline, model)

    def phases_of(group: Group, x: Any, store: Store, *, has_norm: bool) -> list[Phase]:
        """One phase; where CTAs do not run at the same time, one for each of its steps."""
        phases = []
        steps = steps_of(group, plan.is_batch_one)
        for these in (steps,) if compiled else zip(steps):
            gemm = Gemm(
                group,
                plan,
                buffers,
                scalars,
                pipeline,
                semaphores,
                steps=these,
                store=store,
                norm_dim=embed_dim if has_norm else None,
                eps=eps,
                all_reduce=all_reduce if group.all_reduced else None,
                attention=attention,
            )

            def compute(layer, count, gemm=gemm):
                return gemm.compute(layer, count, x, smem.operand_smem, (smem.q_smem, smem.p_smem))

            phases.append(Phase(gemm.copy, compute))
        return phases

    def attend(layer, count):
        with jax.named_scope("attend"):
            return attention.attend(layer, count, smem.q_smem, smem.p_smem)

    def combine(layer, count):
        attention.combine()
        return count

    def residual(group: Group, x: Any, number: int) -> list[Phase]:
        """x + m · W …, or with a norm x + m · norm(W …); `number`: 0 after attention, 1 after the FFN."""
        add = AddResidual(buffers, plan, lambda layer: 2 * layer + 1 + number, model.residual_multiplier)
        if not model.has_output_norms:
            return phases_of(group, x, add, has_norm=False)
        norm = OutputNorm(buffers, plan, add, lambda layer: 2 * layer + number, embed_dim, eps)

        def finish(layer, count):
            norm.run(layer)
            return count

        stored = phases_of(group, x, StoreOutput(buffers, plan), has_norm=False)
        return [*stored, Phase(lambda layer, state: state, finish)]

    hidden = GatedProduct(buffers, plan, model.activation)
    logits = StoreLogits(buffers, model.head_rows, all_reduce)
    layer_phases = [
        *phases_of(plan.qkv, buffers.x_weighted, StoreHeads(buffers, model.head_dim), has_norm=True),
        *([] if plan.o.fused_attention else [Phase(attention.copy, attend)]),
        *([Phase(lambda layer, state: state, combine)] if plan.context_splits > 1 else []),
        *residual(plan.o, buffers.context, 0),
        *phases_of(plan.gate_up, buffers.x_weighted, hidden, has_norm=True),
        *residual(plan.down, buffers.hidden, 1),
    ]
    return layer_phases, phases_of(plan.head, buffers.x_weighted, logits, has_norm=True)


def _kernel(*refs, names, plan, model, span, axis, compiled, **scratch):
    """`span`: (first layer, last layer + 1, phases of a layer, phases after the last) to run. `axis`: of the mesh whose
    devices share the model, or None."""
    buffers, smem = Buffers.of(names, refs), SharedMemory.of(**scratch)
    many_experts = plan.h_rank_tiles < plan.max_rank_tiles
    scalars = Scalars.load(buffers.experts, buffers.num_used, buffers.positions, many_experts=many_experts)
    pipeline = Pipeline(
        smem.stages_smem, smem.stage_full, smem.stage_empty, smem.stage_full_second_half,
        codes_smem=smem.codes_smem, scales_smem=smem.scales_smem,
    )  # fmt: skip
    grid_barrier, semaphores, all_reduce = None, None, None
    if compiled:
        grid_barrier = pl.get_global(plgpu.SemaphoreType.REGULAR)
        semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.num_semaphores,)))
        if axis is not None:
            all_reduce = AllReduce(axis, pl.get_global(plgpu.SemaphoreType.REGULAR))
    layer_phases, last_phases = _phases(plan, buffers, smem, scalars, pipeline, semaphores, all_reduce, model, compiled)
    low, high, these, last = span
    layer_phases, last_phases = layer_phases[slice(*these)], last_phases[slice(*last)]

    def barrier(number):
        """All CTAs have come here the `number`-th time, from 0 on, and see what all have stored before."""
        if compiled:  # the interpreter runs one phase in a launch, or one CTA
            with jax.named_scope("barrier"):
                plgpu.semaphore_signal(grid_barrier, 1, memory_scope="gpu")
                plgpu.semaphore_wait(grid_barrier, plan.num_ctas * (number + 1), decrement=False, memory_scope="gpu")

    def run(do, so_far, between):
        """do(phase, layer, so_far) → so_far of all phases in order, with between(number of phases done) after each but
        the last."""

        def of_layer(layer, so_far):
            for i, phase in enumerate(layer_phases):
                so_far = do(phase, layer, so_far)
                between((layer - low) * len(layer_phases) + i + 1)
            return so_far

        so_far = lax.fori_loop(low, high, of_layer, so_far)
        for i, phase in enumerate(last_phases):
            so_far = do(phase, 0, so_far)
            if i + 1 < len(last_phases):
                between((high - low) * len(layer_phases) + i + 1)

    def copy(phase, layer, state):
        return phase.copy(layer, state.begin())

    def compute(phase, layer, count):
        return phase.compute(layer, count)

    is_producer = lax.axis_index("warpgroup") == 1
    pl.when(is_producer)(lambda: run(copy, pipeline.start(), lambda number: None))

    @pl.when(jnp.logical_not(is_producer))
    def _():
        refs = resident(buffers, plan) if compiled else []
        mark_not_stored(partial_sums_of_layers(buffers, plan) if compiled and plan.is_batch_one else [], plan.num_ctas)
        set_priority(EVICT_LAST, refs, plan.num_ctas)
        barrier(0)
        run(compute, jnp.int32(0), barrier)
        if all_reduce is not None:
            all_reduce.wait_for_all(plan.num_ctas)
        set_priority(EVICT_NORMAL, refs, plan.num_ctas)


def run_megakernel(
    inputs: dict[str, Any],
    plan: Plan,
    model: Any,
    *,
    axis: str | None = None,
    interpret: Any = False,
    one_launch: bool = True,
    profile: Profile | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits [V, N], k_new and v_new [L, N, K, H]). `inputs`: the caller's arrays of `buffers.TABLE`. `axis`: of the
    mesh whose devices share the model."""
    dtype = inputs["x"].dtype
    flat: list[tuple[tuple[str, ...], Any]] = [((k,), v) for k, v in inputs.items() if not isinstance(v, dict)]
    flat += [((k, name), v) for k, d in inputs.items() if isinstance(d, dict) for name, v in d.items()]
    changed = ("x", "x_weighted", "square_sums")
    refs = {name: jax.new_ref(v) if name[0] in changed else v for name, v in flat}
    shapes = scratch_and_outputs(plan, model, dtype, None if axis is None else lax.axis_size(axis))
    for name, (of_shape, of_type) in shapes.items():
        if interpret is False:
            refs[name,] = jax.empty_ref(jax.ShapeDtypeStruct(of_shape, of_type))
        else:  # what is read before it is written shows
            refs[name,] = jax.new_ref(jnp.full(of_shape, jnp.nan, of_type))

    def operand(*shape, dtype=dtype):
        width = min(TILE_K * dtype.itemsize, plgpu.find_swizzle(shape[-1] * dtype.itemsize * 8))
        transforms = plgpu.TilingTransform((8, width // dtype.itemsize)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    # The operands of attention, and of linears: first the ones, then the others, so they take the same place.
    used_in_turn = {
        "operand_smem": operand(plan.x_smem_rows + plan.h_smem_rows, TILE_K),
        "q_smem": operand(model.head_dim // TILE_K, WGMMA_N, TILE_K),
        "p_smem": operand(TILE_M // TILE_K, WGMMA_N, TILE_K),
    }
    linear, q, p = used_in_turn.values()
    stages: dict[str, Any] = {"stages_smem": operand(plan.stages, TILE_M, TILE_K)}
    if plan.layout is not None:
        codes = codes_shape(plan.stages, plan.layout, TILE_M * TILE_K * dtype.itemsize)
        stages["codes_smem"] = operand(*codes, dtype=jnp.dtype(jnp.uint8))
        if not interpret:
            stages = {"stages": plgpu.RefUnion(*([ref] for ref in stages.values()))}
        kind = inputs["scales"]["q_proj"].dtype
        stages["scales_smem"] = plgpu.SMEM((plan.stages, chunk_groups(plan.layout), TILE_M), kind)
    compiler_params = COMPILER_PARAMS
    if profile is not None:
        compiler_params = replace(compiler_params, profile_space=profile.events, profile_dir=profile.directory)

    def launch(span):
        plgpu.kernel(
            partial(
                _kernel, names=tuple(refs), plan=plan, model=model, span=span, axis=axis, compiled=interpret is False
            ),
            out_type=(),
            grid=(plan.num_ctas,),
            grid_names=("cta",),
            num_threads=2,
            thread_name="warpgroup",
            scratch_types={
                **stages,
                "stage_full": plgpu.Barrier(num_barriers=plan.stages),
                "stage_full_second_half": plgpu.Barrier(num_barriers=plan.stages),
                "stage_empty": plgpu.Barrier(num_barriers=plan.stages),
                **(used_in_turn if interpret else {"operands": plgpu.RefUnion([linear], [q, p])}),
            },
            compiler_params=compiler_params,
            interpret=interpret,
        )(*refs.values())

    if one_launch:
        launch((0, model.num_layers, (0, None), (0, None)))
    else:
        # One launch for each step of each phase: between launches all CTAs have stored what they had to.
        *of_layer, of_head = (len(steps_of(group, plan.is_batch_one)) for group in plan.groups)
        for layer in range(model.num_layers):
            phases = sum(of_layer) + (not plan.o.fused_attention) + (plan.context_splits > 1)
            for phase in range(phases + 2 * model.has_output_norms):
                launch((layer, layer + 1, (phase, phase + 1), (0, 0)))
        for phase in range(of_head):
            launch((0, 0, (0, 0), (phase, phase + 1)))
    return jax.freeze(refs["logits",]), jax.freeze(refs["k_new",]), jax.freeze(refs["v_new",])
