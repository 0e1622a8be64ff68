"""Llama: biases on demand, no windows."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import Family, read_layer_types, read_window


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    biased = table.boolean("attention_bias", False)
    _refuse_windows(table, num_layers, max_positions)
    mlp_bias, windows = table.boolean("mlp_bias", False), (None,) * num_layers
    return {"qkv_bias": biased, "o_bias": biased, "mlp_bias": mlp_bias, "sliding_windows": windows}


def _refuse_windows(table: Table, num_layers: int, max_positions: int) -> None:
    """transformers windows the cache of such a model and not its prompt, so that its answers depend on their split."""
    is_windowed, used = read_layer_types(table, num_layers), table.boolean("use_sliding_window", True)
    window = read_window(table, used=used)
    table.integer("max_window_layers", 28, low=-(2**31))
    stated = used and "sliding_window" in table and window is not None and window < max_positions
    if stated or (is_windowed is not None and any(is_windowed)):
        raise table.error("sliding_window" if stated else "layer_types", "llama has no windows; leave it out")


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    architecture="LlamaForCausalLM", num_kv_heads=None, max_positions=2048, bos_token_id=1, eos_token_id=2,
    read=_read, write=_write,
)  # fmt: skip
