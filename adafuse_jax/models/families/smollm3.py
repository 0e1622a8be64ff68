"""SmolLM3: Llama without a rotary embedding in every fourth layer, or in those of `no_rope_layers`; windows on demand."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig, RopeConfig
from adafuse_jax.models.families.family import Family, layer_types, layer_windows, read_layer_types, read_window
from adafuse_jax.models.families.rope import RopeKeys


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    biased, mlp_bias = table.boolean("attention_bias", False), table.boolean("mlp_bias", False)
    nope = _nope_layers(table, num_layers)
    used = table.boolean("use_sliding_window", False)
    window = read_window(table, used=used) if used and "sliding_window" in table else None
    is_windowed = read_layer_types(table, num_layers)
    if is_windowed is None:
        is_windowed = tuple(window is not None and layer in nope for layer in range(num_layers))
    return {
        "nope_layers": nope,
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": mlp_bias,
        "sliding_windows": layer_windows(table, is_windowed, window, num_layers, first=0),
    }


def _nope_layers(table: Table, num_layers: int) -> tuple[int, ...]:
    interval = table.integer("no_rope_layer_interval", 4, low=1)
    has_rope = table.items("no_rope_layers", None)
    if has_rope is None:
        has_rope = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if len(has_rope) < num_layers or any(type(value) is not int or value not in (0, 1) for value in has_rope):
        raise table.error("no_rope_layers", f"it must have 1, or 0 for none, for each of {num_layers} layers")
    return tuple(layer for layer in range(num_layers) if not has_rope[layer])


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = config.sliding_windows or (None,) * config.num_layers
    window = next(filter(None, windows), None)
    return {
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(layer not in config.nope_layers) for layer in range(config.num_layers)],
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": layer_types(windows),
    }


SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM", num_kv_heads=4, max_positions=32768, bos_token_id=128000, eos_token_id=128001,
    pad_token_id=128004, tied=True, rope=RopeKeys(defaults=RopeConfig(theta=2e6)), read=_read, write=_write,
)  # fmt: skip
