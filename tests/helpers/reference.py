"""The backbone in float64, one row, token by token and head by head, with two places where an adapter may act."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from adafuse_jax import Backbone
from adafuse_jax.models.config import RopeConfig

Adapted = Callable[[int, str, np.ndarray, np.ndarray], np.ndarray]
"""(layer, name, input, plain output) → output: of each linear, and with the name `ffn` of the feed-forward block."""


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def hidden_states(model: Backbone, tokens: np.ndarray, adapted: Adapted) -> np.ndarray:
    """Final hidden states [T, D] of tokens [T]; `adapted` is called in execution order."""
    c = model.config
    windows = c.sliding_windows or (None,) * c.num_layers
    keys = [[] for _ in range(c.num_layers)]
    values = [[] for _ in range(c.num_layers)]
    hidden = []

    def norm(x, module, layer=None):
        if module is None:
            return x
        weight = f64(module.weight[...] if layer is None else module.weight[layer])
        x = x - x.mean(-1, keepdims=True) if c.norm == "layer" else x
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * (weight + (c.norm == "rms_1p"))

    def rope(heads, position, layer):
        rope = c.local_rope if c.local_rope and windows[layer] else c.rope
        size = rope.rotary_dim(c.head_dim)
        heads, rest = heads[:, :size], heads[:, size:]
        angles = position * frequencies(rope, size) * (layer not in c.nope_layers)
        cos, sin = rope.attention_factor * np.cos(angles), rope.attention_factor * np.sin(angles)
        pairs = (heads[:, 0::2], heads[:, 1::2]) if rope.interleaved else np.split(heads, 2, axis=-1)
        parts = pairs[0] * cos - pairs[1] * sin, pairs[1] * cos + pairs[0] * sin
        rotated = np.stack(parts, -1).reshape(heads.shape) if rope.interleaved else np.concatenate(parts, -1)
        return np.concatenate([rotated, rest], -1)

    def activation(z):
        if c.activation == "silu":
            return z / (1 + np.exp(-z))
        assert c.activation == "gelu_pytorch_tanh"
        return z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2

    for position, token in enumerate(tokens):
        x = c.embedding_multiplier * f64(model.embed_tokens[token])
        for layer in range(c.num_layers):

            def linear(name, h, layer=layer):
                module = getattr(model.layers, name)
                y = f64(module.weight[layer]) @ h
                if module.bias is not None:
                    y = y + f64(module.bias[layer])
                return adapted(layer, name, h, y)

            h = norm(x, model.layers.input_layernorm, layer)
            q, k, v = (linear(n, h) for n in ("q_proj", "k_proj", "v_proj"))
            if not c.qk_norm_full:
                q, k = q.reshape(-1, c.head_dim), k.reshape(-1, c.head_dim)
            q, k = norm(q, model.layers.q_norm, layer), norm(k, model.layers.k_norm, layer)
            q, k, v = (y.reshape(-1, c.head_dim) for y in (q, k, v))
            keys[layer].append(rope(k, position, layer))
            values[layer].append(v)
            window = windows[layer] or len(tokens)
            context = []
            for head, row in enumerate(rope(q, position, layer)):
                group = head // (c.num_heads // c.num_kv_heads)
                scale = c.head_dim**-0.5 if c.attention_multiplier is None else c.attention_multiplier
                spans = position // c.rope.original_max_position_embeddings
                scale = scale * (1 + c.rope.query_scaling_beta * math.log(1 + spans))
                scores = np.array([row @ key[group] for key in keys[layer][-window:]]) * scale
                if c.attention_softcap is not None:
                    scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
                p = np.exp(scores - scores.max())
                context.append((p / p.sum()) @ np.array([value[group] for value in values[layer][-window:]]))
            y = norm(linear("o_proj", np.concatenate(context)), model.layers.post_self_attn_layernorm, layer)
            x = x + c.residual_multiplier * y
            if not c.parallel_block:
                h = norm(x, model.layers.post_attention_layernorm, layer)
            gate = linear("gate_proj", h)
            out = adapted(layer, "ffn", h, linear("down_proj", activation(gate) * linear("up_proj", h)))
            x = x + c.residual_multiplier * norm(out, model.layers.post_mlp_layernorm, layer)
        hidden.append(norm(x, model.norm))
    return np.array(hidden)


def frequencies(rope: RopeConfig, size: int) -> np.ndarray:
    """Radians per position of the pairs of `size` dimensions: θ^(−2i/size), in yarn over `factor` for pairs that turn less
    than `beta_slow` times in the original length, with a ramp from those that turn `beta_fast` times."""
    frequency = rope.theta ** (-np.arange(size // 2) * 2 / size)
    if rope.kind == "yarn":
        assert rope.truncate
        turns = np.array([rope.beta_fast, rope.beta_slow]) * 2 * math.pi / rope.original_max_position_embeddings
        first, last = -np.log(turns) * size / (2 * math.log(rope.theta))
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        slow = np.clip((np.arange(size // 2) - first) / (last - first), 0, 1)
        return frequency * (1 - slow + slow / rope.factor)
    assert rope.kind == "default"
    return frequency


def top_k_gates(logits: np.ndarray, k: int) -> np.ndarray:
    """Softmax over the k largest logits [E]; zero elsewhere."""
    chosen = np.argsort(-logits)[:k]
    gates = np.zeros(len(logits))
    gates[chosen] = np.exp(logits[chosen] - logits[chosen].max())
    return gates / gates.sum()
