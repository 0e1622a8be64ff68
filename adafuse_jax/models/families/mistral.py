"""Mistral and Ministral 3: one window for all layers; in Mistral also for those of `layer_types`."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ROPE_FIELDS, ModelConfig
from adafuse_jax.models.families.family import Family, layer_types, layer_windows, read_layer_types, read_window
from adafuse_jax.models.families.rope import RopeKeys


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


def _read_ministral3(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    return {"sliding_windows": (table.integer("sliding_window", None, low=1),) * num_layers}


def _write_ministral3(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": next(filter(None, config.sliding_windows), None)}


ABSENT_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MINISTRAL3 = Family(
    architecture="Ministral3ForCausalLM", num_kv_heads=8, max_positions=262144, head_dim=128, bos_token_id=1,
    eos_token_id=2, pad_token_id=11, norm_eps=1e-5,
    rope=RopeKeys(
        scales_queries=True, absent=ABSENT_ROPE,
        kinds={name: name for name in ROPE_FIELDS if name != "dynamic"},  # whose original length is another
    ),
    read=_read_ministral3, write=_write_ministral3,
)  # fmt: skip
