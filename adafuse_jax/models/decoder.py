"""The decoder: one scan over stacked layers, with one hook through which every adapter acts.

    h = norm(x);  x ← x + m · norm(o_proj(attention(q_proj h, k_proj h, v_proj h)))
    h = norm(x);  x ← x + m · norm(down_proj(act(gate_proj h) · up_proj h))

A family has the norm in front of a block, behind it or both, and m = 1 but in Granite. In a parallel block both parts read
the same h. Layers may differ in their window and their rotary embedding, `ModelConfig.rope_of`.

The hook is called as `adapt(name, linear, x)` in place of every `linear(x)`, as `adapt.ffn(block, h)` in place of the
feed-forward block, and as `adapt.residual(name, x, y)` in place of x + y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from adafuse_jax.models.attention import Visibility, attention
from adafuse_jax.models.config import ATTENTION_LINEARS, LINEARS, ModelConfig, Remat
from adafuse_jax.models.hooks import Adapter, Hook
from adafuse_jax.models.kv_cache import KVCache, PromptCache
from adafuse_jax.models.layers import Linear, Norm, gated_product, logit_product, scaled, softcapped
from adafuse_jax.models.layout import ONE_DEVICE, Layout
from adafuse_jax.models.remat import ATTENTION, FFN, kept, rematerialized
from adafuse_jax.models.rotary import layer_rotations, sequence_lengths
from pallas_kernels.quantised import QuantArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Output:
    """Hidden states after the final norm, the adapter's routing, and the cache with these tokens added.

    `routing` is that of the whole model, or that of each layer's routers stacked, [L, routers of a layer, …].
    """

    hidden: Float[Array, "B T D"]
    routing: Any
    cache: KVCache | None
    logits: Float[Array, "B T V"] | None = None


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        layers, shapes = config.num_layers, config.norm_shapes()
        for name in LINEARS:
            out_dim, in_dim = config.linear_shape(name)
            setattr(self, name, Linear(layers, out_dim, in_dim, bias=config.has_bias(name), dtype=dtype, rngs=rngs))

        def norm(name: str) -> Norm | None:
            if name not in shapes:
                return None
            return Norm((layers, *shapes[name]), kind=config.norm, eps=config.norm_eps, dtype=dtype)

        self.input_layernorm = norm("input_layernorm")
        self.post_self_attn_layernorm = norm("post_self_attn_layernorm")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.post_mlp_layernorm = norm("post_mlp_layernorm")
        self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: Callable[[Array, Array, Array], Array],
        adapt: Hook,
        slice_linear: Callable[[str, Array], tuple[Linear, Array]] | None = None,
    ) -> Float[Array, "B T D"]:
        """Run one layer; `slice_linear(name, h)` gives a linear and its input in place of the layer's own."""

        def linear(name: str, h: Array) -> Array:
            module, h = (getattr(self, name), h) if slice_linear is None else slice_linear(name, h)
            return adapt(name, module, h)

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, config.head_dim)  # [B, T, heads, H]

        def attention(h: Array) -> Array:
            q, k, v = (linear(name, h) for name in ATTENTION_LINEARS[:3])
            if config.qk_norm:
                q, k = (kept(y if config.qk_norm_full else heads(y), ATTENTION) for y in (q, k))
                q, k = normed(self.q_norm, q), normed(self.k_norm, k)
            context = attend(heads(q), heads(k), heads(v))
            return linear("o_proj", context.reshape(*h.shape[:2], -1))

        def ffn(h: Array) -> Array:
            gate, up = (kept(linear(name, h), FFN) for name in ("gate_proj", "up_proj"))

            def product(gate: Array, up: Array) -> Array:
                return gated_product(gate, up, config.activation)

            return linear("down_proj", adapt.gated(product, config.activation, gate, up))

        config = self.config
        h = normed(self.input_layernorm, x)
        y = normed(self.post_self_attn_layernorm, attention(h))
        x = kept(adapt.residual("o_proj", x, scaled(y, config.residual_multiplier)), ATTENTION)
        if not config.parallel_block:
            h = normed(self.post_attention_layernorm, x)
        y = normed(self.post_mlp_layernorm, adapt.ffn(ffn, h))
        return adapt.residual("down_proj", x, scaled(y, config.residual_multiplier))


def normed(norm: Norm | None, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """norm(x), or x where a family has no norm."""
    return x if norm is None else norm(x)


class Backbone(nnx.Module):
    """A decoder-only language model; the leaves of `layers` are stacked, [L, …].

    Args:
      config: shapes.
      dtype: of weights and activations.
      rngs: source of the random initial weights.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        init = jax.nn.initializers.normal(0.02)
        shape = (config.vocab_size, config.embed_dim)
        self.config = config
        self.embed_tokens = nnx.Param(init(rngs.params(), shape, dtype))
        self.layers = DecoderLayer(config, dtype=dtype, rngs=rngs)
        self.norm = Norm((config.embed_dim,), kind=config.norm, eps=config.norm_eps, dtype=dtype)
        self.lm_head = None if config.tie_word_embeddings else nnx.Param(init(rngs.params(), shape, dtype))

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed_tokens[...].dtype

    @property
    def head(self) -> Float[Array, "V D"] | QuantArray:
        """The head, or the tied embedding."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)[...]

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Output:
        """`run`, with the logits of every position."""
        out = self.run(tokens, **options)
        return replace(out, logits=self.logits(out.hidden))

    def embed(self, tokens: Int[Array, "B T"], layout: Layout = ONE_DEVICE) -> Float[Array, "B T D"]:
        """The input of layer 0."""
        x, multiplier = layout.embedded(self.embed_tokens[...], tokens), self.config.embedding_multiplier
        return x if multiplier == 1 else x * jnp.asarray(multiplier, x.dtype)

    def logits(
        self, hidden: Float[Array, "*batch D"], head: Float[Array, "V D"] | QuantArray | None = None
    ) -> Float[Array, "*batch V"]:
        """The head, the model's own if none is given, applied to hidden states; fp32."""
        return self.finished(logit_product(hidden, self.head if head is None else head))

    def finished(self, logits: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
        """The logits, from the head's product in fp32."""
        return softcapped(scaled(logits, self.config.logit_multiplier), self.config.logit_softcap)

    def run(
        self,
        tokens: Int[Array, "B T"],
        *,
        adapter: Adapter | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
        max_segments: int | None = None,
        remat: Remat = "none",
        unroll: bool = False,
        attention: Callable[..., Array] = attention,
        layout: Layout = ONE_DEVICE,
    ) -> Output:
        """Run the layers.

        Args:
          tokens: token ids.
          adapter: None runs the bare backbone.
          positions: default 0…T−1. With a cache: the slot of each token, ≥ S for padding.
          segment_ids: attention stays within equal ids, 0 is padding; None is one segment. Not with a cache, where
            every row is one sequence.
          cache: keys and values of the positions before; the returned cache holds these tokens too.
          lengths: with a cache, tokens of each row's prompt, all chunks of it; None: each token is decoded after those
            before it. Only RoPE of a kind that depends on it reads it.
          dropout_key: randomness of the adapter's dropout; None means none.
          max_segments: most segments of a row, not counting padding, which must come last; None is unknown.
          remat: what the backward pass computes again, see `models.remat`.
          unroll: unroll the layers instead of scanning (XLA then reads the stacked weights without copying slices).
          attention: with the signature of `models.attention.attention`, of which `implementation` is not given; under
            `jax.vmap` on a GPU it must have a batching rule of its own.
          layout: of weights and activations over devices.
        """
        config = self.config
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        if cache is None:
            visibility, num_keys = Visibility.of_sequence(tokens.shape[1], segment_ids, max_segments), tokens.shape[1]
        else:
            visibility, num_keys = Visibility.of_cache(positions, cache.slots), cache.slots
        if cache is None and config.length_limits:
            of_tokens: Array | None = sequence_lengths(positions, segment_ids)
        else:
            if lengths is None and tokens.shape[1] > 1 and config.length_limits:
                raise ValueError(f"rope {', '.join(config.length_limits)} depends on a prompt's length; give lengths")
            of_tokens = None if lengths is None else lengths[:, None]
        rotation_of = layer_rotations(config, positions, of_tokens)
        layer_windows = [
            w if w and w < num_keys else None for w in config.sliding_windows or (None,) * config.num_layers
        ]
        windows, window_of_layer = distinct(layer_windows)
        attention = layout.attention(partial(attention, **score_options(config)))

        def run_layer(carry: tuple, layer: DecoderLayer, experts: Any, index: int | Array) -> tuple[tuple, Any]:
            x, cache, routing = carry
            layer, experts = layout.layer((layer, experts))

            def attend(q: Array, k: Array, v: Array) -> Array:
                nonlocal cache
                rotation = rotation_of(index)
                q, k = rotation.of_queries(q), rotation.of_keys(k)
                if cache is not None:
                    cache = cache.write(index, positions, k, v)
                    if isinstance(cache, PromptCache):
                        return cache.attention(index, q)
                    k, v = cache.k[index], cache.v[index]
                if not config.qk_norm:  # whose derivatives need them as they were before
                    q, k = kept((q, k), ATTENTION)
                v = kept(v, ATTENTION)
                if isinstance(index, int) or len(windows) == 1:
                    window = windows[window_of_layer[index] if isinstance(index, int) else 0]
                    return attention(q, k, v, visibility, window)

                def within(window: int | None) -> Callable[[Array, Array, Array], Array]:
                    return lambda q, k, v: attention(q, k, v, visibility, window)

                return jax.lax.switch(
                    jnp.array(window_of_layer)[index], [within(window) for window in windows], q, k, v
                )

            def slice_linear(name: str, h: Array) -> tuple[Linear, Array]:
                # Once its input is computed: a scan copies each slice, and would copy all linears of a layer at once.
                at, h = jax.lax.optimization_barrier((index, h))
                return jax.tree.map(lambda leaf: leaf[at], getattr(self.layers, name)), h

            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            hook = Hook() if adapter is None else adapter.hook(experts, index, routing, key)
            in_place = unroll or cache is None or isinstance(cache, PromptCache)  # see `programs.PREFILL_OPTIONS`
            x = layout.activations(layer(x, attend, hook, None if in_place else slice_linear))
            return (x, cache, hook.routing), hook.layer_routing

        x = self.embed(tokens, layout)  # [B, T, D]
        routing = None if adapter is None else adapter.initial_routing(tokens.shape[0], tokens.shape[1])
        experts = None if adapter is None else adapter.experts
        carry, stacked = (x, cache, routing), (self.layers, experts)
        layer_routings: Any
        if unroll:
            layer_routings = []
            of_layers = (unstack(part, config.num_layers) for part in stacked)
            for index, (layer, layer_experts) in enumerate(zip(*of_layers, strict=True)):
                body = rematerialized(partial(run_layer, index=index), remat, in_scan=False)
                body = body if remat != "none" else layout.body(body, stacked, in_scan=False)
                carry, layer_routing = body(carry, layer, layer_experts)
                layer_routings.append(layer_routing)
            layer_routings = jax.tree.map(lambda *routings: jnp.stack(routings), *layer_routings)
        else:
            body = rematerialized(lambda carry, inputs: run_layer(carry, *inputs), remat, in_scan=True)
            body = body if remat != "none" else layout.body(body, stacked, in_scan=True)
            carry, layer_routings = jax.lax.scan(body, carry, (*stacked, jnp.arange(config.num_layers)))
        x, cache, routing = carry
        return Output(self.norm(x), layer_routings if routing is None else routing, cache)


def score_options(config: ModelConfig) -> dict[str, Any]:
    """The options of `attention` that a model needs."""
    options = {"scale": config.attention_multiplier, "softcap": config.attention_softcap}
    return {name: value for name, value in options.items() if value is not None}


def distinct[T](of_layers: Iterable[T]) -> tuple[list[T], list[int]]:
    """The different values of the layers, and the index of each layer's among them."""
    values = list(of_layers)
    different = list(dict.fromkeys(values))
    return different, [different.index(value) for value in values]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(tree: Any, size: int) -> list[Any]:
    """The slices of stacked leaves, [L, …]. Their gradients are stacked at once, not added up as L padded arrays."""
    return [jax.tree.map(lambda leaf, at=index: leaf[at], tree) for index in range(size)]


unstack.defvjp(
    lambda tree, size: (unstack(tree, size), None),
    lambda size, _, gradients: (jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients),),
)
