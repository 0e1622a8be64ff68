"""Mistral: one window for all layers, or for those of `layer_types`."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import Family, layer_types, layer_windows, read_layer_types, read_window


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    is_windowed, window = read_layer_types(table, num_layers), read_window(table, used=True)
    return {"sliding_windows": layer_windows(table, is_windowed, window, num_layers, first=0)}


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = config.sliding_windows
    some = 0 < sum(map(bool, windows)) < config.num_layers
    keys = {"attention_bias": False, "sliding_window": next(filter(None, windows), None)}
    return keys | ({"layer_types": layer_types(windows)} if some else {})


MISTRAL = Family(
    architecture="MistralForCausalLM", num_kv_heads=8, max_positions=131072, bos_token_id=1, eos_token_id=2,
    read=_read, write=_write,
)  # fmt: skip
