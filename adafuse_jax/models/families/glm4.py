"""GLM4: norms on both sides of every block, gate and up in one tensor, biases of q, k and v, interleaved rotary embedding of
half of each head."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig, RopeConfig
from adafuse_jax.models.families.family import TENSOR_NAMES, Family, no_windows
from adafuse_jax.models.families.rope import RopeKeys

NAMES = TENSOR_NAMES | dict.fromkeys(("gate_proj", "up_proj"), "model.layers.{layer}.mlp.gate_up_proj.{leaf}")


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    biased = table.boolean("attention_bias", True)
    return {
        "norm_placement": "both",
        "qkv_bias": biased,
        "sliding_windows": no_windows(table, num_layers, max_positions),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


GLM4 = Family(
    architecture="Glm4ForCausalLM", num_kv_heads=2, max_positions=131072, head_dim=128, norm_eps=1.5625e-7,
    eos_token_id=(151329, 151336, 151338), pad_token_id=151329, tensor_names=NAMES, fused=(("gate_proj", "up_proj"),),
    rope=RopeKeys(partial=True, defaults=RopeConfig(partial_rotary_factor=0.5, interleaved=True)), read=_read, write=_write,
)  # fmt: skip
