"""Granite 3: Llama with multipliers of embeddings, of scores, of what a block adds, and of logits."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import Family, no_windows

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    biased, mlp_bias = table.boolean("attention_bias", False), table.boolean("mlp_bias", False)
    multipliers = {name: table.number(name, 1.0) for name in MULTIPLIERS}
    return {
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": mlp_bias,
        "logit_multiplier": 1 / table.number("logits_scaling", 1.0, low=0, above=True),
        "sliding_windows": no_windows(table, num_layers, max_positions),
        **multipliers,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    scores = config.attention_multiplier
    return {
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.head_dim**-0.5 if scores is None else scores,
        "logits_scaling": float(f"{1 / config.logit_multiplier:.12g}"),
    }


GRANITE = Family(
    architecture="GraniteForCausalLM", num_kv_heads=None, max_positions=2048, bos_token_id=1, eos_token_id=2,
    read=_read, write=_write,
)  # fmt: skip
