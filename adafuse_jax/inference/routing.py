"""Experts of a decoding step, known before its kernels are launched: looked up by token, or routed in layer 0."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.stacked import StackedAdapters
from adafuse_jax.models.attention import Visibility, attention
from adafuse_jax.models.decoder import Backbone, score_options
from adafuse_jax.models.hooks import TokenExperts
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.rotary import layer_rotations
from pallas_kernels.megakernel.mixture import Mixture, make_mixture

TABLE_ROWS = 4096
"""Tokens whose gates are computed at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class GateTable:
    """Experts and gates by token id."""

    experts: Int[Array, "V k"]
    gates: Float[Array, "V k"]


def tabulate(model: Backbone, adapter: AdaFuse) -> GateTable:
    """The router's answer for every token of the vocabulary."""

    @jax.jit
    def route(embeddings: Array) -> tuple[Array, Array]:
        norm = jax.tree.map(lambda leaf: leaf[0], model.layers.input_layernorm)
        routing = adapter.router(norm(embeddings)[None])
        return routing.experts[0], routing.gates[0]

    tokens = jnp.arange(model.config.vocab_size)
    parts = [route(model.embed(tokens[start : start + TABLE_ROWS])) for start in range(0, len(tokens), TABLE_ROWS)]
    experts, gates = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return GateTable(experts=experts, gates=gates)


def route(
    model: Backbone,
    adapter: AdaFuse | StackedAdapters,
    table: GateTable | None,
    token: Int[Array, " B"],
    positions: Array,
    cache: KVCache,
) -> TokenExperts:
    """Experts and gates of every row's token, before the token runs. Without a table, layer 0 runs up to the last router,
    in XLA."""
    if table is not None:
        return TokenExperts(table.experts[token], table.gates[token])
    layer, experts = jax.tree.map(lambda leaf: leaf[0], (model.layers, adapter.experts))
    hook = adapter.hook(experts, 0, adapter.initial_routing(len(token), 1), None)
    rotated = layer_rotations(model.config, positions[:, None])(0)
    windows = model.config.sliding_windows
    window = windows[0] if windows else None
    rows = jnp.arange(len(token))

    def attend(q: Array, k: Array, v: Array) -> Array:
        q, k = rotated.of_queries(q), rotated.of_keys(k)
        pairs = (cache.k, k), (cache.v, v)
        k, v = (old[0, : len(rows)].at[rows, positions].set(new[:, 0], mode="drop") for old, new in pairs)
        visibility = Visibility.of_cache(positions[:, None], cache.slots)
        return attention(q, k, v, visibility, window, **score_options(model.config))

    layer(model.embed(token[:, None]), attend, hook)
    return hook.routing.of_first_token()


def mixture_of(adapter: AdaFuse | StackedAdapters, chosen: TokenExperts) -> Mixture:
    """The distinct experts of a step, from those of its rows."""
    if isinstance(adapter, StackedAdapters):
        return make_mixture(chosen.experts, adapter.scaled(chosen.gates), 1.0, len(adapter.table.owner))
    return make_mixture(*chosen, adapter.config.scale, adapter.config.num_experts)
