"""One decoding step of the whole model in one launch, on Hopper: one thread block on each multiprocessor, in phases.

    for every layer:   q, k, v   attention   o   gate, up   down          then the head

A phase needs what all blocks have found in the one before, so a barrier over the grid is between them; the weights need
nothing, so one warpgroup of every block copies them into shared memory without ever waiting for a barrier, as far ahead as
the ring has room. While the other warpgroup waits for its peers, the device memory goes on working.

    phase        reads                            leaves
    q, k, v      the norm of x                    q, k, v                                        (linear.py)
    attention    q, k, v, the cache               the context                                    (attention.py)
    o, down      the context, the hidden          x + y, its norm; o's phase begins with attention if o is `attended`
    gate, up     the norm of x                    silu(gate) · up
    head         the norm of x                    logits

Several devices run it together on the model's shares: then the y of o and down is the sum over all of them (peers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.attention import Attention, rounded
from pallas_kernels.decode_token.kept import KEEP, LET_GO, mark
from pallas_kernels.decode_token.linear import Linears, steps_of
from pallas_kernels.decode_token.peers import Peers
from pallas_kernels.decode_token.plan import ADDED_UP, HALF, PIECE, QUERIES, TILE, Plan, div, exchanged, rem
from pallas_kernels.decode_token.ring import Ring
from pallas_kernels.decode_token.shares import Scalars
from pallas_kernels.decode_token.tiles import (
    COMPILER,
    ROWS,
    load,
    load_transposed,
    over_columns,
    silu,
    store,
    store_transposed,
)


@dataclass(frozen=True)
class Phase:
    """`copy(layer, filled)` fills the ring, `compute(layer, count)` empties it; both return how far they are."""

    copy: Callable[[Any, Any], Any]
    compute: Callable[[Any, Any], Any]


def _phases(
    plan: Plan,
    m: SimpleNamespace,
    s: SimpleNamespace,
    ring: Ring,
    semaphores: Any,
    peers: Peers | None,
    model: Any,
    compiled: bool,
) -> tuple[list[Phase], list[Phase]]:
    """(of a layer, after the last layer). `m` are refs of device memory, `s` of shared memory."""
    head_dim, embed_dim = model.head_dim, model.embed_dim

    attention = Attention(plan, m, ring, group_size=model.num_heads // model.num_kv_heads, eps=model.norm_eps)

    def phases_of(group, normed, x, follow):
        """One phase; where blocks do not run at the same time, one for each of its steps."""
        phases = []
        steps = steps_of(group, plan.single)
        for these in (steps,) if compiled else zip(steps):
            linears = Linears(
                group,
                plan,
                m,
                ring,
                semaphores,
                steps=these,
                norm_dim=embed_dim if normed else None,
                eps=model.norm_eps,
                peers=peers if group.added_up else None,
                attention=attention,
            )

            def compute(layer, count, linears=linears):
                return linears.compute(layer, count, x, partial(follow, layer), s.operand_smem, (s.q_smem, s.p_smem))

            phases.append(Phase(linears.copy, compute))
        return phases

    def rows_of(ref, row, columns):
        """[QUERIES, HALF] of activations in pieces."""
        return ref.at[pl.ds(div(row, PIECE) * plan.columns + columns.start, columns.size)]

    def to_heads(layer, names, row, columns):
        (name,), head, part = names, div(row, head_dim), rem(row, head_dim)
        if name == "v_proj":
            return partial(store_transposed, m.v_new.at[layer, columns, head, pl.ds(part, HALF)])
        raw = m.q_raw if name == "q_proj" else m.k_raw

        def put(value):
            for start in range(0, 2 * PIECE, head_dim):  # a head of PIECE dimensions twice
                store_transposed(raw.at[head, columns, pl.ds(start + part, HALF)], value)

        return put

    def to_residual(next_norm):
        def follow(layer, names, row, columns):
            x_rows = rows_of(m.x, row, columns)
            x = load_transposed(x_rows).astype(jnp.float32)
            weight = load(m.norms.at[next_norm(layer), pl.ds(row, HALF)], ROWS).astype(jnp.float32)

            def put(value):
                after = rounded(x + rounded(value, m.x.dtype), m.x.dtype)
                store_transposed(x_rows, after)
                store_transposed(rows_of(m.x_weighted, row, columns), after * over_columns(weight, after.shape))
                store(m.squares.at[div(row, HALF), columns], (after * after).sum(axis=0))

            return put

        return follow

    def to_hidden(layer, names, row, columns):
        def put(gate, up):
            gate, up = rounded(gate, m.hidden.dtype), rounded(up, m.hidden.dtype)
            store_transposed(rows_of(m.hidden, row, columns), rounded(silu(gate), m.hidden.dtype) * up)

        return put

    def to_logits(layer, names, row, columns):
        def put(value):
            if peers is None:
                store(m.logits.at[pl.ds(row, HALF), columns], value)
            else:
                peers.store(m.logits.at[pl.ds(peers.own * model.vocab_size + row, HALF), columns], value)

        return put

    def attend(layer, count):
        with jax.named_scope("attend"):
            return attention.attend(layer, count, s.q_smem, s.p_smem)

    def combine(layer, count):
        attention.combine()
        return count

    layer_phases = [
        *phases_of(plan.qkv, True, m.x_weighted, to_heads),
        *([] if plan.o.attended else [Phase(attention.copy, attend)]),
        *([Phase(lambda layer, filled: filled, combine)] if plan.splits > 1 else []),
        *phases_of(plan.o, False, m.context, to_residual(lambda layer: 2 * layer + 1)),
        *phases_of(plan.gate_up, True, m.x_weighted, to_hidden),
        *phases_of(plan.down, False, m.hidden, to_residual(lambda layer: 2 * layer + 2)),
    ]
    return layer_phases, phases_of(plan.head, True, m.x_weighted, to_logits)


def _kernel(*refs, names, plan, model, span, axis, compiled, **scratch):
    """`span`: (first layer, last layer + 1, phases of a layer, phases after the last) to run. `axis`: of the mesh whose
    devices share the model, or None."""
    m, s = _nested(names, refs), SimpleNamespace(**scratch)
    if "in_turn" in scratch:
        (s.operand_smem,), (s.q_smem, s.p_smem) = scratch["in_turn"]
    m.scalars = Scalars.of(m)
    ring = Ring(s.ring_smem, s.ring_full, s.ring_empty, s.ring_other_full)
    arrived, semaphores, peers = None, None, None
    if compiled:
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.num_semaphores,)))
        if axis is not None:
            peers = Peers(axis, pl.get_global(plgpu.SemaphoreType.REGULAR))
    layer_phases, last_phases = _phases(plan, m, s, ring, semaphores, peers, model, compiled)
    low, high, these, last = span
    layer_phases, last_phases = layer_phases[slice(*these)], last_phases[slice(*last)]

    def barrier(number):
        """The `number`-th time, all blocks have come here, and see what all have stored before."""
        if compiled:  # the interpreter runs one phase in a launch, or one block
            with jax.named_scope("barrier"):
                plgpu.semaphore_signal(arrived, 1, memory_scope="gpu")
                plgpu.semaphore_wait(arrived, plan.num_blocks * number, decrement=False, memory_scope="gpu")

    def run(do, so_far, between):
        """do(phase, layer, so_far) → so_far of all phases in order, with between(number of phases done) after each but the
        last."""

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

    def copy(phase, layer, filled):
        return phase.copy(layer, filled.begin())

    def compute(phase, layer, count):
        return phase.compute(layer, count)

    is_copier = lax.axis_index("group") == 1
    pl.when(is_copier)(lambda: run(copy, ring.start(), lambda number: None))

    @pl.when(jnp.logical_not(is_copier))
    def _():
        kept = _kept(m, plan) if compiled else []
        mark(KEEP, kept, plan.num_blocks)
        run(compute, jnp.int32(0), barrier)
        if peers is not None:
            peers.wait_for_all(plan.num_blocks)
        mark(LET_GO, kept, plan.num_blocks)


def _kept(m: SimpleNamespace, plan: Plan) -> list[Any]:
    """What stays in the L2 cache: x, and the parts of a layer's sums."""
    kept = [m.x, m.t_part] if hasattr(m, "t_part") else [m.x]
    kept += [m.y_part.at[part, pl.ds(0, tiles)] for part, tiles in enumerate(plan.tiles_by_part())]
    if hasattr(m, "y_of_all"):
        kept += [m.y_of_all.at[index] for index in np.ndindex(*m.y_of_all.shape[:3])]
    return kept


def _nested(names: Sequence[tuple[str, ...]], refs: Sequence[Any]) -> SimpleNamespace:
    """("a", "q_proj") → memory.a["q_proj"]; ("x",) → memory.x."""
    memory: dict[str, Any] = {"weights": {}, "biases": {}, "a": {}, "b": {}, "q_norm": None, "k_norm": None}
    for name, ref in zip(names, refs, strict=True):
        if len(name) == 1:
            memory[name[0]] = ref
        else:
            memory[name[0]][name[1]] = ref
    return SimpleNamespace(**memory)


def run_token(
    inputs: dict[str, Any],
    plan: Plan,
    model: Any,
    *,
    axis: str | None = None,
    interpret: Any = False,
    one_launch: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits [V, N], k_new and v_new [L, N, K, H]). `inputs` are the arrays that `_phases` reads, nested by name; see
    `pallas_kernels.decode_token.op`. `axis`: of the mesh whose devices share the model."""
    dtype, n = inputs["x"].dtype, plan.columns
    new = (model.num_layers, n, model.num_kv_heads, model.head_dim)
    split = (plan.splits, n, model.num_kv_heads * -(-model.num_heads // model.num_kv_heads // QUERIES))
    heads_dim = model.num_heads * model.head_dim
    buffers = {
        **exchanged(plan.groups, plan, dtype),
        "r": ((plan.num_blocks, n), jnp.float32),
        "q_raw": ((model.num_heads + QUERIES, n, 2 * PIECE), dtype), "k_raw": ((model.num_kv_heads, n, 2 * PIECE), dtype),
        "context": ((heads_dim // PIECE * n + HALF, PIECE), dtype),
        "hidden": ((model.hidden_dim // PIECE * n + HALF, PIECE), dtype),
        "logits": ((model.vocab_size, n), jnp.float32), "k_new": (new, dtype), "v_new": (new, dtype),
    }  # fmt: skip
    if plan.splits > 1:
        buffers["o_part"] = ((*split, model.head_dim // PIECE, HALF, QUERIES), jnp.float32)
        buffers |= dict.fromkeys(("max_part", "sum_part"), ((*split, QUERIES), jnp.float32))
    if axis is not None:
        devices = lax.axis_size(axis)
        parts = exchanged([group for group in plan.groups if group.added_up], plan, dtype)["y_part"]
        buffers["y_of_all"] = (len(ADDED_UP), devices, *parts[0]), parts[1]
        buffers["logits"] = (devices * model.vocab_size, n), jnp.float32
    flat: list[tuple[tuple[str, ...], Any]] = [((k,), v) for k, v in inputs.items() if not isinstance(v, dict)]
    flat += [((k, name), v) for k, d in inputs.items() if isinstance(d, dict) for name, v in d.items()]
    changed = ("x", "x_weighted", "squares")
    refs = {name: jax.new_ref(v) if name[0] in changed else v for name, v in flat}
    for name, (of_shape, of_type) in buffers.items():
        if interpret is False:
            refs[name,] = jax.empty_ref(jax.ShapeDtypeStruct(of_shape, of_type))
        else:  # whatever is read before it is written shows
            refs[name,] = jax.new_ref(jnp.full(of_shape, jnp.nan, of_type))

    def ring(*shape):
        width = plgpu.find_swizzle(shape[-1] * dtype.itemsize * 8)
        transforms = plgpu.TilingTransform((8, width // dtype.itemsize)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    # The operands of attention, and of linears: first the ones, then the others, so they take the same place.
    used_in_turn = {
        "operand_smem": ring(plan.x_rows + plan.h_rows, PIECE),
        "q_smem": ring(model.head_dim // PIECE, QUERIES, PIECE), "p_smem": ring(TILE // PIECE, QUERIES, PIECE),
    }  # fmt: skip
    operand, q, p = used_in_turn.values()
    *of_layer, of_head = (len(steps_of(group, plan.single)) for group in plan.groups)  # launches, if every step is one

    def launch(span):
        plgpu.kernel(
            partial(
                _kernel, names=tuple(refs), plan=plan, model=model, span=span, axis=axis, compiled=interpret is False
            ),
            out_type=(),
            grid=(plan.num_blocks,),
            grid_names=("block",),
            num_threads=2,
            thread_name="group",
            scratch_types={
                "ring_smem": ring(plan.slots, TILE, PIECE),
                "ring_full": plgpu.Barrier(num_barriers=plan.slots),
                "ring_other_full": plgpu.Barrier(num_barriers=plan.slots),
                "ring_empty": plgpu.Barrier(num_barriers=plan.slots),
                **(used_in_turn if interpret else {"in_turn": plgpu.RefUnion([operand], [q, p])}),
            },
            compiler_params=COMPILER,
            interpret=interpret,
        )(*refs.values())

    if one_launch:
        launch((0, model.num_layers, (0, None), (0, None)))
    else:
        for layer in range(model.num_layers):
            for phase in range(sum(of_layer) + (not plan.o.attended) + (plan.splits > 1)):
                launch((layer, layer + 1, (phase, phase + 1), (0, 0)))
        for phase in range(of_head):
            launch((0, 0, (0, 0), (phase, phase + 1)))
    return jax.freeze(refs["logits",]), jax.freeze(refs["k_new",]), jax.freeze(refs["v_new",])
