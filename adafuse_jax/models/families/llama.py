"""Llama: biases on demand, no windows."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import Family, no_windows


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    biased = table.boolean("attention_bias", False)
    mlp_bias, windows = table.boolean("mlp_bias", False), no_windows(table, num_layers, max_positions)
    return {"qkv_bias": biased, "o_bias": biased, "mlp_bias": mlp_bias, "sliding_windows": windows}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    architecture="LlamaForCausalLM", num_kv_heads=None, max_positions=2048, bos_token_id=1, eos_token_id=2,
    read=_read, write=_write,
)  # fmt: skip
