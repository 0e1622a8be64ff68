"""Seed-OSS: Llama with biases of q, k and v, and others on demand."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import Family, no_windows


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    return {
        "qkv_bias": table.boolean("attention_bias", True),
        "o_bias": table.boolean("attention_out_bias", False),
        "mlp_bias": table.boolean("mlp_bias", False),
        "sliding_windows": no_windows(table, num_layers, max_positions),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "attention_out_bias": config.o_bias, "mlp_bias": config.mlp_bias}


SEED_OSS = Family(
    architecture="SeedOssForCausalLM", num_kv_heads=8, max_positions=524288, head_dim=128, bos_token_id=0, eos_token_id=2,
    pad_token_id=1, read=_read, write=_write,
)  # fmt: skip
