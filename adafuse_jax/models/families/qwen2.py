"""Qwen2 and Qwen2.5: biases on q, k and v; windows on demand, in the layers from `max_window_layers` on."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import Family, layer_types, layer_windows, read_layer_types, read_window


def read_windows(table: Table, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window, from `layer_types` or else from `use_sliding_window` and `max_window_layers`."""
    is_windowed, used = read_layer_types(table, num_layers), table.boolean("use_sliding_window", False)
    window, first = read_window(table, used=used), table.integer("max_window_layers", 28, low=-(2**31))
    return layer_windows(table, is_windowed, window if used else None, num_layers, first=first)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    windows = config.sliding_windows or (None,) * config.num_layers
    window = next(filter(None, windows), None)
    return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": layer_types(windows)}


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_windows": read_windows(table, num_layers)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False} | write_windows(config)


QWEN2 = Family(architecture="Qwen2ForCausalLM", num_kv_heads=32, max_positions=32768, read=_read, write=_write)
