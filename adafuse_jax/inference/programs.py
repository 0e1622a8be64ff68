"""The two jitted programs of generation, over one donated state.

    prefill   writes a prompt into the cache, a chunk at a time, every prompt token with its own gates
    step      token → gates → adapted backbone → next token; cache, position and merged weights are updated in place

How the experts act in a step is the engine's strategy: *unmerged*, y = W x + Σ_j g_j s B[e_j] (A[e_j] x), the same as one
launch, *fused*, or one of `merging`'s, whose backbone is one launch too where that can run. Prefill is unmerged with each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from adafuse_jax.inference.backends.megakernel import Fused, fused_step, route
from adafuse_jax.inference.backends.merged import Merged, Merging, update_merged, with_weights
from adafuse_jax.inference.sampling import Sampling, sample
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter
from adafuse_jax.models.kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """Everything a step reads and replaces. `token` is sampled but not yet in the cache; it will take slot `position`. Each
    row has a key of its own."""

    cache: KVCache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    key: Key[Array, " B"]


@partial(jax.jit, static_argnames="pad_id", donate_argnames=("state", "logits"))
def prefill_chunk(
    model: Backbone,
    adapter: Any,
    state: DecodeState,
    logits: Array,
    tokens: Array,
    lengths: Array,
    pad_id: int,
) -> tuple[DecodeState, Array]:
    """Put tokens[b, :lengths[b]] into the cache; `logits` [B, V] of rows that have tokens here are replaced."""
    offset = jnp.arange(tokens.shape[1])
    inside = offset < lengths[:, None]  # [B, T]
    slots = jnp.where(inside, state.position[:, None] + offset, state.cache.slots)
    out = model.run(jnp.where(inside, tokens, pad_id), adapter=adapter, positions=slots, cache=state.cache)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]  # [B, D]
    assert out.cache is not None
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(lengths))[:, None], jnp.where(inside, tokens, seen.shape[1])].set(
            True, mode="drop"
        )
    logits = jnp.where((lengths > 0)[:, None], model.logits(last), logits)
    return replace(state, cache=out.cache, position=state.position + lengths, seen=seen), logits


def _choose(
    state: DecodeState, logits: Array, sampling: Sampling, eos_ids: tuple[int, ...], pad_id: int
) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Sample the next token of every row that has not ended; and whether the logits of those rows are finite."""
    key = draw = state.key
    if not sampling.greedy:
        key, draw = jnp.moveaxis(jax.vmap(jax.random.split)(state.key), 1, 0)
    finite = state.done | jnp.isfinite(logits).all(axis=-1)
    token = jnp.where(state.done, pad_id, sample(logits, sampling, draw, state.seen))
    done = state.done | jnp.isin(token, jnp.array(eos_ids, jnp.int32))
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    return replace(state, token=token, done=done, seen=seen, key=key), finite


@partial(jax.jit, static_argnames=("eos_ids", "pad_id"), donate_argnames="state")
def first_token(
    state: DecodeState, logits: Array, sampling: Sampling, eos_ids: tuple[int, ...], pad_id: int
) -> tuple[Any, DecodeState]:
    """Sample after the prompt. Returns ((token, done, finite, None), state)."""
    state, finite = _choose(state, logits, sampling, eos_ids, pad_id)
    return (state.token, state.done, finite, None), state


@partial(jax.jit, static_argnames=("eos_ids", "pad_id"), donate_argnames=("state", "merged"))
def decode_step(
    model: Backbone,
    adapter: Any,
    state: DecodeState,
    merged: Merged | None,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    pad_id: int,
    fused: Fused | None = None,
) -> tuple[Any, DecodeState, Merged | None]:
    """Read `state.token`, sample the one after it. Returns ((token, done, finite, experts), state, merged); the old
    state and what was merged are donated. `merged` None decodes unmerged; with `fused` all layers are one launch."""
    if fused is not None:
        token, position, cache = state.token, state.position, state.cache
        if merged is None:
            logits, experts, cache = fused_step(model, adapter, fused, token, position, cache)
        else:
            # Nothing adapted runs before the router: with *switch*, those weights are only named here.
            whole = with_weights(model, merged.weights)
            experts, gates = route(whole, adapter, fused.table, token, position, cache)
            merged = update_merged(adapter, model, merged, experts[0], gates[0], hold=state.done[0])
            logits, _, cache = fused_step(with_weights(model, merged.weights), None, fused, token, position, cache)
        state = replace(state, cache=cache, position=position + 1)
        state, finite = _choose(state, logits, sampling, eos_ids, pad_id)
        return (state.token, state.done, finite, experts), state, merged
    acting: Adapter | None = adapter
    if merged is not None:
        acting = Merging(adapter, model, merged, hold=state.done[0])
    out = model.run(
        state.token[:, None], adapter=acting, positions=state.position[:, None], cache=state.cache, unroll=True
    )
    assert out.cache is not None
    routing, merged = (out.routing, None) if merged is None else out.routing
    experts = None if routing is None else routing.experts_of_row()
    state = replace(state, cache=out.cache, position=state.position + 1)
    state, finite = _choose(state, model.logits(out.hidden[:, 0]), sampling, eos_ids, pad_id)
    return (state.token, state.done, finite, experts), state, merged
