"""Qwen3: norms of queries and keys, attention biases on demand, windows as Qwen2."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import Family
from adafuse_jax.models.families.qwen2 import read_windows, write_windows


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    biased, windows = table.boolean("attention_bias", False), read_windows(table, num_layers)
    return {"qk_norm": True, "qkv_bias": biased, "o_bias": biased, "sliding_windows": windows}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias} | write_windows(config)


QWEN3 = Family(
    architecture="Qwen3ForCausalLM", num_kv_heads=32, max_positions=32768, head_dim=128, read=_read, write=_write
)
