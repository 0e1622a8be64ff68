"""Pre-gated linears on Hopper in one launch: one group of linears of the whole-token kernel.

    experts    t_part[s] = A[e_u] x of slice s, each block its share of ranks and of columns
    gather     h_u = g_u · Σ_s t_part[s]
    products   y_part[s] = W x of slice s, its share of tiles; y_part[S] = Σ_u B[e_u] h_u, its share of them
    finish     y = Σ_s y_part[s], rounded once

A warpgroup that only copies has B on its way before it can be used. See `pallas_kernels.decode_token.linear`.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_token.linear import Linears, steps_of
from pallas_kernels.decode_token.plan import (
    HALF,
    MIN_SLOTS,
    PIECE,
    TILE,
    columns_for,
    exchanged,
    expert_rows,
    in_pieces,
    input_rows,
    make_group,
    max_in_dim,
    no_room,
    slots_beside,
)
from pallas_kernels.decode_token.ring import Ring
from pallas_kernels.decode_token.shares import Scalars
from pallas_kernels.decode_token.tiles import COMPILER, store_transposed
from pallas_kernels.pregated_linear.mixture import Mixture, used_first

MAX_BATCH = 32


def obstacle(x: Array, weights: dict[str, Array], a: dict[str, Array]) -> str | None:
    """Why these shapes cannot run here, or None."""
    if x.dtype.itemsize != 2:
        return f"x is {x.dtype}, and the tensor cores multiply bfloat16 and float16"
    if len(x) > MAX_BATCH:
        return f"{len(x)} rows come together, and it takes {MAX_BATCH} at most"
    if x.shape[1] > max_in_dim(len(x)):
        return f"x has {x.shape[1]} columns, and with {len(x)} rows it takes {max_in_dim(len(x))} at most"
    for name, w in weights.items():
        if w.shape[1] % HALF or w.shape[2] % PIECE:
            return f"{name} is [{w.shape[1]}, {w.shape[2]}], and it takes multiples of 64"
    for name, factor in a.items():
        if factor.shape[2] % PIECE:
            return f"{name} has rank {factor.shape[2]}, and it takes multiples of {PIECE}"
    return None


def _kernel(
    *refs, names, plan, group, steps, compiled, ring_smem, ring_full, ring_other_full, ring_empty, operand_smem
):
    """`steps`: those that this launch runs."""
    memory: dict[str, Any] = {"biases": {}, "weights": {}, "a": {}, "b": {}, "y": {}}
    for name, ref in zip(names, refs, strict=True):
        if isinstance(name, tuple):
            memory[name[0]][name[1]] = ref
        else:
            memory[name] = ref
    m = SimpleNamespace(**memory)
    m.scalars = Scalars.of(m)
    ring = Ring(ring_smem, ring_full, ring_empty, ring_other_full)
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((group.num_semaphores,))) if compiled else None
    linears = Linears(
        group, plan, m, ring, semaphores, steps=steps, turn=lambda layer: 0, norm_dim=None, eps=0.0
    )  # fmt: skip
    layer = m.layer[0]

    def follow(names, row, columns):
        return partial(store_transposed, m.y[names[0]].at[columns, pl.ds(row, HALF)])

    @pl.when(lax.axis_index("group") == 1)
    def _copy():
        linears.copy(layer, ring.start())

    @pl.when(lax.axis_index("group") == 0)
    def _compute():
        linears.compute(layer, jnp.int32(0), m.x, follow, operand_smem)


def pregated_linear_mosaic(
    x: Float[Array, "B in"],
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    layer: int | Int[Array, ""],
    *,
    interpret: Any = False,
    num_blocks: int | None = None,
) -> dict[str, Array]:
    """See `pallas_kernels.pregated_linear.pregated_linear`. `num_blocks` thread blocks run (default: one on each
    multiprocessor); interpreted on the CPU, each step is a launch. Raises `ValueError` as `obstacle` says."""
    why_not = obstacle(x, weights, a)
    if why_not is not None:
        raise ValueError(f"pregated_linear cannot run as pallas: {why_not}")
    batch, dtype, itemsize = len(x), x.dtype, x.dtype.itemsize
    columns, blocks = columns_for(batch), num_blocks or jax.devices()[0].core_count
    shapes = {name: (w.shape[1], w.shape[2]) for name, w in weights.items()}
    inputs: dict[Any, Any] = {
        "x": in_pieces(jnp.pad(x, ((0, columns - batch), (0, 0)))),
        "layer": jnp.int32(layer)[None],
    }
    max_used, rank_pieces = 1, 1
    if mixture is not None and a:
        max_used, rank_pieces = len(mixture.experts), next(iter(a.values())).shape[2] // PIECE
        mixture, num_used = used_first(mixture)
        inputs |= {"experts": mixture.experts, "num_used": num_used}
        inputs["gates"] = jnp.pad(mixture.gates, ((0, 0), (0, columns - batch)))
    pieces = max_used * rank_pieces
    group = make_group(
        shapes, tuple((name,) for name in shapes), tuple(a), pieces=pieces, num_blocks=blocks, columns=columns,
        itemsize=itemsize, single=batch == 1,
    )  # fmt: skip
    plan = SimpleNamespace(
        single=batch == 1, columns=columns, rank_pieces=rank_pieces, pieces=pieces, num_blocks=blocks,
        x_rows=input_rows(group.slice_chunks, columns),
    )  # fmt: skip
    inputs |= {(kind, name): w for kind, of in (("weights", weights), ("a", a), ("b", b)) for name, w in of.items()}
    buffers: dict[Any, Any] = {**exchanged([group], plan, dtype)}
    buffers |= {("y", name): ((columns, out), dtype) for name, (out, _) in shapes.items()}
    refs = dict(inputs)
    for name, (of_shape, of_type) in buffers.items():
        if interpret is False:
            refs[name] = jax.empty_ref(jax.ShapeDtypeStruct(of_shape, of_type))
        else:  # whatever is read before it is written shows
            refs[name] = jax.new_ref(jnp.full(of_shape, jnp.nan, of_type))

    def operand(*shape: int):
        width = plgpu.find_swizzle(PIECE * itemsize * 8)
        tiling = plgpu.TilingTransform((8, width // itemsize))  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(width)))  # type: ignore[abstract]

    h_rows = expert_rows([group], pieces, columns, plan.single)
    slots = slots_beside(plan.x_rows + h_rows, itemsize)
    if slots < MIN_SLOTS:
        raise ValueError(f"pregated_linear cannot run as pallas: {no_room(max_used, PIECE * rank_pieces, batch)}")
    steps = steps_of(group, plan.single)
    for these in (steps,) if interpret is False else zip(steps):
        plgpu.kernel(
            partial(_kernel, names=tuple(refs), plan=plan, group=group, steps=these, compiled=interpret is False),
            out_type=(),
            grid=(blocks,),
            grid_names=("block",),
            num_threads=2,
            thread_name="group",
            scratch_types={
                "ring_smem": operand(slots, TILE, PIECE),
                "ring_full": plgpu.Barrier(num_barriers=slots),
                "ring_other_full": plgpu.Barrier(num_barriers=slots),
                "ring_empty": plgpu.Barrier(num_barriers=slots),
                "operand_smem": operand(plan.x_rows + h_rows, PIECE),
            },
            compiler_params=COMPILER,
            interpret=interpret,
        )(*refs.values())
    return {name: jax.freeze(refs["y", name])[:batch] for name in weights}
