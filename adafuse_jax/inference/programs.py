"""The jitted programs of generation, over one donated state.

prefill   prefill_chunk, prefill_chunk_by_kernels: prompts into the cache, a chunk at a time, every token with its own gates;
          start: their first token
step      decode_step: one token of every row through the backend; cache, position and merged weights change in place
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.stacked import NO_ADAPTER, of_rows
from adafuse_jax.inference.ahead import Program
from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.logprobs import LogProbs, log_probabilities, of_prompt
from adafuse_jax.inference.prefill import adapter_of_prompts
from adafuse_jax.inference.sampling import Sampling, sample
from adafuse_jax.inference.state import DecodeState
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import TokenExperts
from adafuse_jax.models.kv_cache import KVCache, PromptCache

PREFILL_OPTIONS = {
    "xla_gpu_enable_dynamic_slice_fusion": True,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
"""XLA's options of a prefill by kernels: products are cuBLAS', one for each linear, and read the weights of a layer in
place. XLA's own, or one for several linears, would need a copy of them."""


class StepResult(NamedTuple):
    """`finite`: whether the row's logits are; `experts` read the token before, and are None of a prompt; `logprobs` [B] of
    the token, if they are wanted."""

    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    experts: TokenExperts | None
    logprobs: LogProbs | None


def _prefill_chunk(
    model: Backbone,
    adapter: Any,
    state: DecodeState,
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R T"],
    starts: Int[Array, " R"],
    lengths: Int[Array, " R"],
    rows: Int[Array, " R"] | None,
    pad_id: int,
    adapters: Int[Array, " R"] | None = None,
    following: Int[Array, "R T"] | None = None,
    totals: Int[Array, " R"] | None = None,
    *,
    by_kernels: bool,
) -> tuple[DecodeState, Float[Array, "R V"], LogProbs | None]:
    """Put tokens[r, :lengths[r]] into the cache of slot rows[r] (None: of every slot, R = B), from position starts[r] on.
    `logits` of rows that have tokens here are replaced. Until `start`, steps write nothing into these slots. `adapters`: the
    rows' ids in a bank. `totals`: tokens of each whole prompt, for RoPE that depends on them. Returns (state, logits,
    log-probabilities of the tokens `following` each, if they are given)."""
    at: Any = slice(None) if rows is None else rows
    cache: KVCache
    if by_kernels:
        slots = jnp.arange(len(lengths)) if rows is None else rows
        cache = PromptCache.of(state.cache, model.config, rows=slots, starts=starts, lengths=lengths)
    else:
        cache = state.cache if rows is None else state.cache.of_rows(rows)
    offset = jnp.arange(tokens.shape[1])
    inside = offset < lengths[:, None]  # [R, T]
    positions = jnp.where(inside, starts[:, None] + offset, cache.slots)
    ids = state.adapter if state.adapter is None or adapters is None else state.adapter.at[at].set(adapters)
    adapter = of_rows(adapter, adapters)
    if by_kernels:
        adapter = adapter_of_prompts(model, adapter, tokens)
    tokens_in = jnp.where(inside, tokens, pad_id)
    out = model.run(tokens_in, adapter=adapter, positions=positions, cache=cache, lengths=totals)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]  # [R, D]
    assert out.cache is not None
    if isinstance(out.cache, PromptCache):
        new_cache = out.cache.whole
    else:
        new_cache = out.cache if rows is None else state.cache.with_rows(rows, out.cache)
    seen = state.seen
    if seen is not None:
        before = jnp.where((starts > 0)[:, None], seen[at], 0)
        new = jnp.where(inside, tokens, seen.shape[1])
        seen = seen.at[at].set(before.at[jnp.arange(len(lengths))[:, None], new].set(1, mode="drop"))
    state = replace(
        state,
        cache=new_cache,
        position=state.position.at[at].set(cache.slots),
        done=state.done.at[at].set(True),
        seen=seen,
        adapter=ids,
    )
    logprobs = None if following is None else of_prompt(model, out.hidden, following)
    if len(last) == 1:  # of one row alone cuBLAS has no product with fp32 results: XLA would convert the head
        new_logits = model.logits(jnp.concatenate([last, last]))[:1]
    else:
        new_logits = model.logits(last)
    return state, jnp.where((lengths > 0)[:, None], new_logits, logits), logprobs


_prefill_program = partial(Program, static_argnames="pad_id", donate_argnames=("state", "logits"))
prefill_chunk = _prefill_program(partial(_prefill_chunk, by_kernels=False))
prefill_chunk_by_kernels = _prefill_program(partial(_prefill_chunk, by_kernels=True), compiler_options=PREFILL_OPTIONS)
"""`prefill_chunk` where `prefill.kernels_unsupported_reason` has no reason against it."""


@partial(Program, static_argnames=("pad_id", "with_logprobs"), donate_argnames="state")
def start(
    state: DecodeState,
    logits: Float[Array, "R V"],
    rows: Int[Array, " R"],
    positions: Int[Array, " R"],
    keys: Key[Array, " R"],
    sampling: Sampling,
    stop_ids: Int[Array, "R M"],
    pad_id: int,
    with_logprobs: bool = False,
) -> tuple[StepResult, DecodeState]:
    """Sample after the prompts of slots `rows`, whose next position is `positions`; the other slots stay as they are."""
    seen = None if state.seen is None else state.seen[rows]
    ended = jnp.zeros(len(rows), bool)
    token, done, seen, keys, finite = _choose(logits, ended, seen, keys, sampling, stop_ids, pad_id)
    state = replace(
        state,
        token=state.token.at[rows].set(token),
        position=state.position.at[rows].set(positions),
        done=state.done.at[rows].set(done),
        seen=None if state.seen is None else state.seen.at[rows].set(seen),
        key=state.key.at[rows].set(keys),
    )
    finite = jnp.ones_like(state.done).at[rows].set(finite)
    logprobs = log_probabilities(logits, token) if with_logprobs else None
    logprobs = jax.tree.map(lambda x: jnp.zeros((len(finite), *x.shape[1:]), x.dtype).at[rows].set(x), logprobs)
    return StepResult(state.token, state.done, finite, None, logprobs), state


@partial(Program, static_argnames=("step", "pad_id", "with_logprobs", "width"), donate_argnames=("state", "carry"))
def decode_step(
    step: Callable[..., Any],
    reads: Any,
    carry: Any,
    state: DecodeState,
    sampling: Sampling,
    stop_ids: Int[Array, "B M"],
    pad_id: int,
    with_logprobs: bool = False,
    width: int | None = None,
) -> tuple[StepResult, DecodeState, Any]:
    """Read the pending token of every row by the backend's `step`, and sample the one after it. Returns (result, state,
    carry); the old state and carry are donated. `width`: of the first rows only, in a step of so many; the result is
    theirs."""
    others: Any = replace(state, cache=None)  # type: ignore[arg-type]
    if width is not None:
        first, sampling, stop_ids = jax.tree.map(lambda x: x[:width], (others, sampling, stop_ids))
        state = replace(first, cache=state.cache)
    if state.adapter is not None:  # the experts of an ended row are not read
        reads = of_rows(reads, jnp.where(state.done, NO_ADAPTER, state.adapter))
    logits, experts, cache, carry = step(reads, carry, state.token, state.position, state.cache, state.done)
    token, done, seen, key, finite = _choose(logits, state.done, state.seen, state.key, sampling, stop_ids, pad_id)
    position = jnp.where(state.done, state.position, state.position + 1)
    state = replace(state, cache=cache, token=token, position=position, done=done, seen=seen, key=key)
    logprobs = log_probabilities(logits, token) if with_logprobs else None
    if width is not None:
        written = jax.tree.map(lambda old, new: old.at[:width].set(new), others, replace(state, cache=None))  # type: ignore[arg-type]
        state = replace(written, cache=cache)
    return StepResult(token, done, finite, experts, logprobs), state, carry


def advance(
    backend: Backend,
    state: DecodeState,
    sampling: Sampling,
    stop_ids: Int[Array, "B M"],
    pad_id: int = 0,
    with_logprobs: bool = False,
    width: int | None = None,
) -> tuple[StepResult, DecodeState]:
    """`decode_step` of a backend, which lends its carry; one that fails takes the carry along."""
    carry = backend.take_carry()
    result, state, carry = decode_step(
        backend.step, backend.reads, carry, state, sampling, stop_ids, pad_id, with_logprobs, width
    )
    backend.put_carry(carry)
    return result, state


@partial(Program, donate_argnames="state")
def release(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """The row of a slot has ended."""
    return replace(state, done=state.done.at[slot].set(True))


@partial(Program, donate_argnames="state", static_argnames="copied")
def copy_prefix(
    state: DecodeState, source: Int[Array, ""], target: Int[Array, ""], length: Int[Array, ""], copied: int
) -> DecodeState:
    """Copy the first `length` tokens of one slot, at most `copied`, to another, which has no row that runs. From now on
    steps write nothing there: the row before may have ended at a position that the copy has."""
    cache = state.cache.with_prefix(source, target, length, copied=copied)
    return replace(state, cache=cache, position=state.position.at[target].set(cache.slots))


@partial(Program, donate_argnames="state")
def clear(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """Make a slot as it was without rows. What a row leaves is multiplied by 0, and must be finite."""
    cache = jax.tree.map(lambda x: x.at[:, slot].set(0), state.cache)
    position, token = (x.at[slot].set(0) for x in (state.position, state.token))
    return replace(state, cache=cache, position=position, token=token, done=state.done.at[slot].set(True))


def _choose(
    logits: Float[Array, "B V"],
    ended: Bool[Array, " B"],
    seen: Int[Array, "B V"] | None,
    key: Key[Array, " B"],
    sampling: Sampling,
    stop_ids: Int[Array, "B M"],
    pad_id: int,
) -> tuple[Any, ...]:
    """(token, done, seen, key, finite): the next token of rows that have not `ended`, and whether logits are finite."""
    draw = key
    if not sampling.greedy:
        key, draw = jnp.moveaxis(jax.vmap(jax.random.split)(key), 1, 0)
    finite = ended | jnp.isfinite(logits).all(axis=-1)
    token = jnp.where(ended, pad_id, sample(logits, sampling, draw, seen))
    done = ended | (token[:, None] == stop_ids).any(axis=-1)
    if seen is not None:
        rows, drawn = jnp.arange(len(token)), jnp.where(ended, seen.shape[1], token)  # no pad of a row in its prefill
        seen = seen.at[rows, drawn].set(jnp.maximum(seen[rows, token], 1) + 1, mode="drop")
    return token, done, seen, key, finite
