"""Cohere2 (Command R7B): parallel blocks behind one layer norm, a multiplier of logits, interleaved rotary embedding in the
layers with a window and none in the others."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig, RopeConfig
from adafuse_jax.models.families.family import Family, patterned_windows, write_pattern
from adafuse_jax.models.families.rope import RopeKeys


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    biased = table.boolean("attention_bias", False)
    windows = patterned_windows(table, num_layers, table.integer("sliding_window_pattern", 4, low=1))
    return {
        "norm": "layer",
        "parallel_block": True,
        "logit_multiplier": table.number("logit_scale", 0.0625),
        "qkv_bias": biased,
        "o_bias": biased,
        "sliding_windows": windows,
        "nope_layers": tuple(layer for layer, window in enumerate(windows) if window is None),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    own = {"attention_bias": config.o_bias, "logit_scale": config.logit_multiplier}
    return own | write_pattern(config)


COHERE2 = Family(
    architecture="Cohere2ForCausalLM", num_kv_heads=None, max_positions=8192, bos_token_id=5, eos_token_id=255001,
    pad_token_id=0, tied=True, norm_eps=1e-5, keys={"rms_norm_eps": "layer_norm_eps"},
    rope=RopeKeys(defaults=RopeConfig(interleaved=True)), read=_read, write=_write,
)  # fmt: skip
