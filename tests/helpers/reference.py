"""The backbone in float64, one row, token by token and head by head, with two places where an adapter may act."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adafuse_jax import Backbone

Adapted = Callable[[int, str, np.ndarray, np.ndarray], np.ndarray]
"""(layer, name, input, plain output) → output: of each linear, and with the name `ffn` of the feed-forward block."""


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def hidden_states(model: Backbone, tokens: np.ndarray, adapted: Adapted) -> np.ndarray:
    """Final hidden states [T, D] of tokens [T]; `adapted` is called in execution order."""
    c = model.config
    half = c.head_dim // 2
    frequency = c.rope.theta ** (-np.arange(half) * 2 / c.head_dim)
    keys = [[] for _ in range(c.num_layers)]
    values = [[] for _ in range(c.num_layers)]
    hidden = []

    def norm(x, module, layer=None):
        weight = f64(module.weight[...] if layer is None else module.weight[layer])
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight

    def rope(heads, position):
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        first, second = heads[:, :half], heads[:, half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    for position, token in enumerate(tokens):
        x = f64(model.embed_tokens[token])
        for layer in range(c.num_layers):

            def linear(name, h, layer=layer):
                module = getattr(model.layers, name)
                y = f64(module.weight[layer]) @ h
                if module.bias is not None:
                    y = y + f64(module.bias[layer])
                return adapted(layer, name, h, y)

            h = norm(x, model.layers.input_layernorm, layer)
            q, k, v = (linear(n, h).reshape(-1, c.head_dim) for n in ("q_proj", "k_proj", "v_proj"))
            if c.qk_norm:
                q, k = norm(q, model.layers.q_norm, layer), norm(k, model.layers.k_norm, layer)
            keys[layer].append(rope(k, position))
            values[layer].append(v)
            window = c.sliding_windows[layer] or len(tokens)
            context = []
            for head, row in enumerate(rope(q, position)):
                group = head // (c.num_heads // c.num_kv_heads)
                scores = np.array([row @ key[group] for key in keys[layer][-window:]]) / np.sqrt(c.head_dim)
                p = np.exp(scores - scores.max())
                context.append((p / p.sum()) @ np.array([value[group] for value in values[layer][-window:]]))
            x = x + linear("o_proj", np.concatenate(context))
            h = norm(x, model.layers.post_attention_layernorm, layer)
            gate = linear("gate_proj", h)
            out = linear("down_proj", gate / (1 + np.exp(-gate)) * linear("up_proj", h))
            x = x + adapted(layer, "ffn", h, out)
        hidden.append(norm(x, model.norm))
    return np.array(hidden)


def top_k_gates(logits: np.ndarray, k: int) -> np.ndarray:
    """Softmax over the k largest logits [E]; zero elsewhere."""
    chosen = np.argsort(-logits)[:k]
    gates = np.zeros(len(logits))
    gates[chosen] = np.exp(logits[chosen] - logits[chosen].max())
    return gates / gates.sum()
