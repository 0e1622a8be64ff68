"""Greedy decoding of many prompts by several replicas at once: prefill, then one token a step for all, with a KV cache.

It serves exact match of gsm8k and pass@1 of programs. The product's engine decodes one adapter; this decodes S that
differ in their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.training.replicas import replica_attention
from studies.accuracy.pregated import request_of, seen
from studies.accuracy.tasks import final_number


@partial(jax.jit, static_argnames="new_tokens")
def greedy(
    model: Backbone,
    params: Any,
    prompts: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    task: Int[Array, " N"],
    stops: Int[Array, " stops"],
    *,
    new_tokens: int,
) -> Int[Array, "S N new"]:
    """The likeliest token again and again, until one of `stops`, which is repeated to the end."""
    count, width = prompts.shape
    slots = width + new_tokens

    def next_token(hidden: Array) -> Array:
        return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)

    def prefill(params: Any) -> tuple[Array, KVCache, Array | None]:
        index = jnp.broadcast_to(jnp.arange(width), prompts.shape)
        positions = jnp.where(index < lengths[:, None], index, slots)  # what pads a prompt is not cached
        inside = index < lengths[:, None]
        asked = request_of(params, model, prompts, index, inside.astype(jnp.int32), inside)
        tasks = jnp.broadcast_to(task[:, None], prompts.shape)
        adapter, context = seen(params, model, prompts, positions, tasks, **asked)
        cache = KVCache.empty(model.config, count, slots, model.dtype)
        out = model.run(prompts, adapter=adapter, positions=positions, cache=cache, attention=replica_attention)
        last = (jnp.arange(count), lengths - 1)
        assert out.cache is not None
        return next_token(out.hidden[last]), out.cache, None if context is None else context[last]

    def advance(params: Any, token: Array, cache: KVCache, past: Array | None, at: Array) -> tuple[Array, KVCache, Any]:
        tokens, positions = token[:, None], (lengths + at)[:, None]
        adapter, context = seen(params, model, tokens, positions, task[:, None], past=past)
        out = model.run(tokens, adapter=adapter, positions=positions, cache=cache, attention=replica_attention)
        assert out.cache is not None
        return next_token(out.hidden[:, 0]), out.cache, None if context is None else context[:, 0]

    token, cache, past = jax.vmap(prefill)(params)
    found = jnp.zeros((*token.shape, new_tokens), jnp.int32).at[..., 0].set(token)

    def unfinished(state: tuple) -> Array:
        at, token, *_ = state
        return (at + 1 < new_tokens) & ~jnp.isin(token, stops).all()

    def body(state: tuple) -> tuple:
        at, token, cache, past, found = state
        fresh, cache, past = jax.vmap(advance, in_axes=(0, 0, 0, 0, None))(params, token, cache, past, at)
        token = jnp.where(jnp.isin(token, stops), token, fresh)
        return at + 1, token, cache, past, found.at[..., at + 1].set(token)

    at, token, _, _, found = jax.lax.while_loop(unfinished, body, (jnp.int32(0), token, cache, past, found))
    return jnp.where(jnp.arange(new_tokens) <= at, found, token[..., None])


def until_stop(found: Int[np.ndarray, "S N new"], stops: tuple[int, ...]) -> list[list[list[int]]]:
    """The replies' tokens before the first stop."""
    return [
        [reply[: next((i for i, t in enumerate(reply) if t in stops), None)] for reply in replies]
        for replies in found.tolist()
    ]


def exact_match(replies: Sequence[str], numbers: Float[np.ndarray, " N"]) -> float:
    """Points of the replies whose final number is the right one."""
    return 100 * float(np.mean([final_number(text) == number for text, number in zip(replies, numbers, strict=True)]))
