"""OLMo 2 and 3: norms behind every block and none in front, norms of all queries and of all keys together. OLMo 3 has
windows in all but every fourth layer, and RoPE by the kind of layer."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig, RopeConfig
from adafuse_jax.models.families.family import POST_NORM_NAMES, Family, no_windows, patterned_windows, write_pattern
from adafuse_jax.models.families.rope import RopeKeys

SHARED: dict[str, Any] = {
    "num_kv_heads": None, "max_positions": 2048, "eos_token_id": 50279, "pad_token_id": 1, "norm_eps": 1e-5,
    "tensor_names": POST_NORM_NAMES,
}  # fmt: skip


def _read(table: Table, windows: tuple[int | None, ...]) -> dict[str, Any]:
    biased = table.boolean("attention_bias", False)
    return {
        "norm_placement": "post",
        "qk_norm": True,
        "qk_norm_full": True,
        "qkv_bias": biased,
        "o_bias": biased,
        "sliding_windows": windows,
    }


def _read_olmo2(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    return _read(table, no_windows(table, num_layers, max_positions))


def _write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias}


def _read_olmo3(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    return _read(table, patterned_windows(table, num_layers, pattern=4))


def _write_olmo3(config: ModelConfig) -> dict[str, Any]:
    return _write_olmo2(config) | write_pattern(config)


OLMO2 = Family(architecture="Olmo2ForCausalLM", read=_read_olmo2, write=_write_olmo2, **SHARED)
OLMO3 = Family(
    architecture="Olmo3ForCausalLM", read=_read_olmo3, write=_write_olmo3, **SHARED,
    rope=RopeKeys(defaults=RopeConfig(theta=5e5)), local_rope=RopeKeys(defaults=RopeConfig(theta=5e5), theta_key=None),
)  # fmt: skip
