"""One decoding step of the whole model in one launch, on Hopper: one thread block on each multiprocessor, in phases.

    for every layer:   q, k, v   attention   o   gate, up   down          then the head

A phase needs what all blocks have found in the one before, so a barrier over the grid is between them; the weights need
nothing, so one warpgroup of every block copies them into shared memory without ever waiting for a barrier, as far ahead as
the ring has room. While the other warpgroup waits for its peers, the device memory goes on working.

    phase        reads                    leaves
    multiply     a slice of the input     partial products of W, and of A of the experts used       (linear.py)
    finish       partial products, B      q, k, v | x + y, its norm | silu(gate) · up | logits
    attend       q, k, v, the cache       the context                                                (attention.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.attention import Attention, rounded
from pallas_kernels.decode_token.linear import (
    ROWS,
    Linears,
    Ring,
    load,
    load_transposed,
    over_columns,
    silu,
    store_transposed,
)
from pallas_kernels.decode_token.plan import HALF, PIECE, TILE, Plan


@dataclass(frozen=True)
class Phase:
    """`copy(layer, count)` fills the ring, `compute(layer, count)` empties it; both return the new count."""

    copy: Callable[[Any, Any], Any]
    compute: Callable[[Any, Any], Any]


def _phases(
    plan: Plan, m: SimpleNamespace, s: SimpleNamespace, ring: Ring, model: Any
) -> tuple[list[Phase], list[Phase]]:
    """(of a layer, after the last layer). `m` are refs of device memory, `s` of shared memory."""
    head_dim, embed_dim = model.head_dim, model.embed_dim
    group_size = model.num_heads // model.num_kv_heads

    def linears(group, normed):
        return Linears(group, plan, m, ring, norm_dim=embed_dim if normed else None, eps=model.norm_eps)

    def multiply(linear, x_piece):
        return Phase(linear.copy_multiply, lambda layer, count: linear.multiply(layer, count, x_piece, s.x_smem))

    def finish(linear, passes, follow):
        return Phase(
            lambda layer, count: linear.copy_finish(layer, count, passes),
            lambda layer, count: linear.finish(layer, count, passes, partial(follow, layer), s.h_smem),
        )

    def of_rows(ref):
        return lambda piece: ref.at[:, pl.ds(piece * PIECE, PIECE)]

    def of_heads(piece):
        head, part = piece * PIECE // head_dim, piece * PIECE % head_dim
        return m.context.at[:, head // group_size, head % group_size, pl.ds(part, PIECE)]

    def to_heads(layer, names, row):
        (name,), head, part = names, row // head_dim, row % head_dim
        if name == "q_proj":
            target = m.q_raw.at[:, head // group_size, head % group_size, pl.ds(part, HALF)]
        else:
            target = (m.k_raw if name == "k_proj" else m.v_new.at[layer]).at[:, head, pl.ds(part, HALF)]
        return partial(store_transposed, target)

    def to_residual(next_norm):
        def follow(layer, names, row):
            x_rows = m.x.at[:, pl.ds(row, HALF)]
            x = load_transposed(x_rows).astype(jnp.float32)
            weight = load(m.norms.at[next_norm(layer), pl.ds(row, HALF)], ROWS).astype(jnp.float32)

            def store(value):
                after = rounded(x + rounded(value, m.x.dtype), m.x.dtype)
                store_transposed(x_rows, after)
                store_transposed(m.x_weighted.at[:, pl.ds(row, HALF)], after * over_columns(weight, after.shape))
                m.squares.at[row // HALF][...] = (after * after).sum(axis=0)

            return store

        return follow

    def to_hidden(layer, names, row):
        def store(gate, up):
            gate, up = rounded(gate, m.hidden.dtype), rounded(up, m.hidden.dtype)
            store_transposed(m.hidden.at[:, pl.ds(row, HALF)], rounded(silu(gate), m.hidden.dtype) * up)

        return store

    def to_logits(layer, names, row):
        def store(value):
            m.logits.at[pl.ds(row, HALF)][...] = value

        return store

    qkv, o, gate_up = linears(plan.qkv, True), linears(plan.o, False), linears(plan.gate_up, True)
    down, head = linears(plan.down, False), linears(plan.head, True)
    attention = Attention(plan, m, ring, eps=model.norm_eps)

    def nothing(layer, count):
        return count

    def combine(layer, count):
        attention.combine()
        return count

    layer_phases = [
        multiply(qkv, of_rows(m.x_weighted)),
        finish(qkv, [("q_proj",), ("k_proj",), ("v_proj",)], to_heads),
        Phase(attention.copy, lambda layer, count: attention.attend(layer, count, s.q_smem, s.p_smem, s.plain_smem)),
        *([Phase(nothing, combine)] if plan.splits > 1 else []),
        multiply(o, of_heads),
        finish(o, [("o_proj",)], to_residual(lambda layer: 2 * layer + 1)),
        multiply(gate_up, of_rows(m.x_weighted)),
        finish(gate_up, [("gate_proj", "up_proj")], to_hidden),
        multiply(down, of_rows(m.hidden)),
        finish(down, [("down_proj",)], to_residual(lambda layer: 2 * layer + 2)),
    ]
    return layer_phases, [multiply(head, of_rows(m.x_weighted)), finish(head, [("lm_head",)], to_logits)]


def _kernel(*refs, names, plan, model, span, compiled, **scratch):
    """`span`: (first layer, last layer + 1, phases of a layer, phases after the last) to run."""
    m, s = _nested(names, refs), SimpleNamespace(**scratch)
    if "in_turn" in scratch:
        s.x_smem, s.h_smem, (s.q_smem, s.p_smem, s.plain_smem) = scratch["in_turn"]
    ring = Ring(s.ring_smem, s.ring_full, s.ring_empty)
    layer_phases, last_phases = _phases(plan, m, s, ring, model)
    low, high, these, last = span
    layer_phases, last_phases = layer_phases[slice(*these)], last_phases[slice(*last)]
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR) if compiled else None

    def barrier(number):
        """The `number`-th time, all blocks have come here, and see what all have stored before."""
        if compiled:  # the interpreter runs one phase in a launch, or one block
            plgpu.semaphore_signal(arrived, 1, memory_scope="gpu")
            plgpu.semaphore_wait(arrived, plan.num_blocks * number, decrement=False, memory_scope="gpu")

    def run(phases_do, between):
        """All phases in order, with `between(number of phases done)` after each but the last."""

        def of_layer(layer, count):
            for i, phase in enumerate(layer_phases):
                count = phases_do(phase)(layer, count)
                between((layer - low) * len(layer_phases) + i + 1)
            return count

        count = lax.fori_loop(low, high, of_layer, jnp.int32(0))
        for i, phase in enumerate(last_phases):
            count = phases_do(phase)(0, count)
            if i + 1 < len(last_phases):
                between((high - low) * len(layer_phases) + i + 1)

    is_copier = lax.axis_index("group") == 1
    pl.when(is_copier)(lambda: run(lambda phase: phase.copy, lambda number: None))
    pl.when(jnp.logical_not(is_copier))(lambda: run(lambda phase: phase.compute, barrier))


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
    inputs: dict[str, Any], plan: Plan, model: Any, *, interpret: Any = False, one_launch: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits [V, N], k_new and v_new [L, N, K, H]). `inputs` are the arrays that `_phases` reads, nested by name; see
    `pallas_kernels.decode_token.op`."""
    dtype, n = inputs["x"].dtype, plan.columns
    heads = model.num_kv_heads, HALF, model.head_dim
    tiles = max(group.num_tiles for group in plan.groups)
    targets = max(len(group.adapted) for group in plan.groups)
    pieces = plan.max_used * plan.rank_pieces
    new = (model.num_layers, n, model.num_kv_heads, model.head_dim)
    split = (plan.splits, n, model.num_kv_heads, HALF)
    buffers = {
        "y_part": ((plan.max_slices, tiles, 2, HALF, n), jnp.float32),
        "r": ((plan.num_blocks, n), jnp.float32),
        "q_raw": ((n, *heads), dtype), "k_raw": ((n, model.num_kv_heads, model.head_dim), dtype),
        "context": ((n, *heads), dtype), "hidden": ((n, model.hidden_dim), dtype),
        "logits": ((model.vocab_size, n), jnp.float32), "k_new": (new, dtype), "v_new": (new, dtype),
    }  # fmt: skip
    if targets:
        buffers["t_part"] = ((plan.max_slices, targets, pieces, PIECE, n), jnp.float32)
    if plan.splits > 1:
        buffers |= {"o_part": ((*split, model.head_dim), jnp.float32), "max_part": (split, jnp.float32)}
        buffers["sum_part"] = (split, jnp.float32)
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

    # Inputs, experts' activations, and attention's operands: one at a time, so they take the same place.
    used_in_turn = {
        "x_smem": ring(plan.x_chunks, n, PIECE),
        "h_smem": ring(*plan.h_shape, n, PIECE),
        "q_smem": ring(model.head_dim // PIECE, HALF, PIECE), "p_smem": ring(HALF, TILE),
        "plain_smem": plgpu.SMEM((HALF, PIECE), dtype),
    }  # fmt: skip
    x, h, *attention = used_in_turn.values()
    in_turn = x, h, attention
    num_phases = 9 + (plan.splits > 1)

    def launch(span):
        plgpu.kernel(
            partial(_kernel, names=tuple(refs), plan=plan, model=model, span=span, compiled=interpret is False),
            out_type=(),
            grid=(plan.num_blocks,),
            grid_names=("block",),
            num_threads=2,
            thread_name="group",
            scratch_types={
                "ring_smem": ring(plan.slots, TILE, PIECE),
                "ring_full": plgpu.Barrier(num_barriers=plan.slots),
                "ring_empty": plgpu.Barrier(num_barriers=plan.slots),
                **(used_in_turn if interpret else {"in_turn": plgpu.RefUnion(*in_turn)}),
            },
            interpret=interpret,
        )(*refs.values())

    if one_launch:
        launch((0, model.num_layers, (0, num_phases), (0, 2)))
    else:
        for layer in range(model.num_layers):
            for phase in range(num_phases):
                launch((layer, layer + 1, (phase, phase + 1), (0, 0)))
        for phase in range(2):
            launch((0, 0, (0, 0), (phase, phase + 1)))
    return jax.freeze(refs["logits",]), jax.freeze(refs["k_new",]), jax.freeze(refs["v_new",])
