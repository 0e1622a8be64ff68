"""A decode step in five kernel launches a layer, for GPUs and models without a megakernel.

    h = norm(x);  q, k, v = W_q h, W_k h, W_v h     with experts      `pallas_kernels.pregated_linear`
    c = attention(rope(q), rope(k), v, cache)       cache updated     `pallas_kernels.decode_attention`
    x ← x + W_o c                                   with experts
    h = norm(x);  f = act(W_gate h) · W_up h        with experts
    x ← x + W_down f                                with experts

The experts are known before layer 0. One row folds the norms in front of linears into the launches; several leave them to
XLA, as tensor cores take h rounded. XLA also computes what only some families have: layer norms, norms behind a block or of
all heads together, multipliers of what a block adds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.stacked import StackedAdapters
from adafuse_jax.inference.routing import mixture_of, route
from adafuse_jax.models.config import LINEARS, unsupported_field
from adafuse_jax.models.decoder import Backbone, normed
from adafuse_jax.models.hooks import TokenExperts
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.layers import Norm, scaled
from adafuse_jax.models.quantised import quantisation_of
from adafuse_jax.models.rotary import TABLE_FIELDS, layer_rotations
from adafuse_jax.parallel.mesh import mesh_of
from pallas_kernels import decode_attention as attention_kernel
from pallas_kernels import pregated_linear as linear_kernel
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.devices import triton_unsupported_reason
from pallas_kernels.pregated_linear import ACTIVATIONS, Group, Mixture, pregated_linear, tiles_for
from pallas_kernels.quantised import QuantArray

CONSUMED_FIELDS = frozenset({
    "vocab_size", "embed_dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "norm_eps",
    "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "sliding_windows",
    "norm", "norm_placement", "parallel_block", "activation", "local_rope", "nope_layers", "qk_norm_full",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logit_multiplier", "attention_softcap",
    "logit_softcap", *TABLE_FIELDS,
    "model_type", "max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id",  # cannot matter to a step
})  # fmt: skip
"""Fields of `ModelConfig` that reach the kernels; a model with any other is decoded by its own modules."""
GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)


def unsupported_reason(model: Backbone, adapter: Any, batch: int) -> str | None:
    """The reason why the kernels cannot decode `batch` rows with this model and adapter on its device, or None."""
    return device_unsupported_reason(model) or shape_unsupported_reason(model, adapter, batch)


def device_unsupported_reason(model: Backbone) -> str | None:
    """The part of `unsupported_reason` that the model's devices decide."""
    if mesh_of(model) is not None:
        return "they run on one device, and the model is on several"
    return triton_unsupported_reason(next(iter(model.embed_tokens[...].devices())))


def shape_unsupported_reason(model: Backbone, adapter: Any, batch: int) -> str | None:
    """The part of `unsupported_reason` that no device matters to."""
    config = model.config
    if reason := unsupported_field(config, CONSUMED_FIELDS):
        return reason
    if config.activation not in ACTIVATIONS:
        return f"the model has activation {config.activation!r}, which it does not take"
    if adapter is not None and not isinstance(adapter, AdaFuse | LoRA | StackedAdapters):
        return f"{type(adapter).__name__} has no experts that are known before the first layer"
    factors = {} if adapter is None else {name: e.A[...] for name, e in adapter.experts.items()}
    if model.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the model is {model.dtype}"
    weights = {name: getattr(model.layers, name).weight[...] for name in LINEARS} | {"lm_head": model.head}
    reason = linear_kernel.unsupported_reason(batch, factors, weights)
    return reason or attention_kernel.unsupported_reason(config.head_dim)


def portable_step(
    model: Backbone,
    adapter: AdaFuse | LoRA | StackedAdapters | None,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    cache: KVCache,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B V"], TokenExperts | None, KVCache]:
    """Read one token of every row: logits of the next (fp32), the experts that read it, the cache with it.

    The adapter's experts are of the model's type. Every step has counters of its own, which begin at 0: one that failed
    leaves nothing behind.
    """
    config, layers, batch = model.config, model.layers, len(token)
    chosen, mixture, num_used = _mixture(model, adapter, token, position, cache)
    experts = {} if adapter is None else dict(adapter.experts.items())
    linears, layout = {name: getattr(layers, name) for name in LINEARS}, quantisation_of(model)
    counters: list[tuple[str, ...]] = [names for names in GROUPS if any(name in experts for name in names)]
    ready = jnp.zeros(config.num_layers * max(1, len(counters)), jnp.int32)

    def group(
        names: tuple[str, ...], x: Array, layer: Any, norm: Norm | None = None, residual: Array | None = None
    ) -> dict[str, Array]:
        nonlocal ready
        adapted = [name for name in names if name in experts]
        weights = {name: linears[name].weight[...] for name in names}
        gated = ("gate_proj", "up_proj") if names == GROUPS[2] else None
        if norm is not None and not _is_folded(norm, batch):
            x, norm = normed(_of_layer(norm, layer), x), None
        outs = [w.shape[1] for w in weights.values()]
        settings = Group(
            tiles=tiles_for(batch, outs, x.shape[1], x.dtype.itemsize, bool(gated), layout), out_dtype=x.dtype,
            gated=gated,
            activation=config.activation, eps=config.norm_eps,
            counter=counters.index(names) if adapted else 0, counters=max(1, len(counters)),
        )  # fmt: skip
        y, ready = pregated_linear(
            x, weights, {name: experts[name].A[...] for name in adapted},
            {name: experts[name].B[...] for name in adapted}, mixture if adapted else None, num_used, layer, ready,
            group=settings, norm=None if norm is None else norm.factor, residual=residual,
            biases={name: linears[name].bias[...] for name in names if linears[name].bias is not None},
            interpret=interpret,
        )  # fmt: skip
        return y

    def plus(x: Array, names: tuple[str, ...], y: Array, layer: Any, norm: Norm | None) -> Array:
        """x + m · norm(W y)."""
        if norm is None and config.residual_multiplier == 1:
            return group(names, y, layer, residual=x)[names[0]]
        y = group(names, y, layer)[names[0]]
        return x + scaled(normed(_of_layer(norm, layer), y), config.residual_multiplier)

    rotation_of = layer_rotations(config, position[:, None])
    windows = np.array([w or np.iinfo(np.int32).max // 2 for w in config.sliding_windows or [None] * config.num_layers])
    attend = partial(
        decode_attention, position=position, windows=jnp.asarray(windows, jnp.int32), eps=config.norm_eps,
        q_norm=None if layers.q_norm is None or config.qk_norm_full else layers.q_norm.factor,
        k_norm=None if layers.k_norm is None or config.qk_norm_full else layers.k_norm.factor,
        scale=config.attention_multiplier, softcap=config.attention_softcap, interpret=interpret,
    )  # fmt: skip
    ended = jnp.zeros((batch, config.num_kv_heads), jnp.int32)
    x, cache_k, cache_v = model.embed(token), cache.k, cache.v
    for index in range(config.num_layers):
        layer = np.array([index], np.int32)
        qkv = group(GROUPS[0], x, layer, layers.input_layernorm)
        if config.qk_norm_full:
            for name, full_norm in (("q_proj", layers.q_norm), ("k_proj", layers.k_norm)):
                qkv[name] = normed(_of_layer(full_norm, layer), qkv[name])
        q, k, v = (qkv[name].reshape(batch, -1, config.head_dim) for name in GROUPS[0])
        cos, sin = (angles[:, 0, 0] for angles in (rotation_of(index).cos, rotation_of(index).sin))
        context, cache_k, cache_v, ended = attend(q, k, v, cache_k, cache_v, layer, cos=cos, sin=sin, ended=ended)
        read, norm = x, layers.input_layernorm  # of a parallel block
        x = plus(x, GROUPS[1], context.reshape(batch, -1), layer, layers.post_self_attn_layernorm)
        if not config.parallel_block:
            read, norm = x, layers.post_attention_layernorm
        f = group(GROUPS[2], read, layer, norm)["gate_proj"]
        x = plus(x, GROUPS[3], f, layer, layers.post_mlp_layernorm)
    return _logits(model, x, interpret), chosen, KVCache(cache_k, cache_v)


def _mixture(
    model: Backbone, adapter: AdaFuse | LoRA | StackedAdapters | None, token: Array, position: Array, cache: KVCache
) -> tuple[TokenExperts | None, Mixture | None, Array | np.ndarray]:
    """(the experts of every row or None, the mixture of the step or None, how many of its experts are in use)."""
    batch = len(token)
    if adapter is None:
        return None, None, np.zeros(1, np.int32)
    if isinstance(adapter, LoRA):
        always = jnp.full((1, batch), adapter.config.scale, jnp.float32)
        return None, Mixture(jnp.zeros(1, jnp.int32), always), np.ones(1, np.int32)
    chosen = route(model, adapter, None, token, position, cache)
    mixture = mixture_of(adapter, chosen)
    return chosen, mixture, (mixture.gates != 0).any(axis=1).sum(dtype=jnp.int32)[None]


def _is_folded(norm: Norm, batch: int) -> bool:
    """Return whether a launch computes the norm of its input."""
    return batch == 1 and norm.kind != "layer"


def _of_layer(norm: Norm | None, layer: Any) -> Norm | None:
    return jax.tree.map(lambda leaf: leaf[int(layer[0])], norm)


def _logits(model: Backbone, x: Float[Array, "B D"], interpret: bool) -> Float[Array, "B V"]:
    head, zero, folded = model.head[None], np.zeros(1, np.int32), _is_folded(model.norm, len(x))
    if not folded:
        x = model.norm(x)
    layout = head.layout if isinstance(head, QuantArray) else None
    tiles = tiles_for(len(x), [head.shape[1]], x.shape[1], x.dtype.itemsize, layout=layout)
    y, _ = pregated_linear(
        x, {"lm_head": head}, {}, {}, None, zero, zero, jnp.zeros(1, jnp.int32), interpret=interpret,
        group=Group(tiles=tiles, out_dtype=jnp.dtype("float32"), eps=model.config.norm_eps),
        norm=model.norm.factor[None] if folded else None,
    )  # fmt: skip
    return model.finished(y["lm_head"])
