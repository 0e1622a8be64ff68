"""Phi-3 and Phi-4: q, k and v are one tensor, as are gate and up; one window for all layers, on demand."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import TENSOR_NAMES, Family
from adafuse_jax.models.families.rope import RopeKeys

NAMES = TENSOR_NAMES | {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "model.layers.{layer}.self_attn.qkv_proj.{leaf}"),
    **dict.fromkeys(("gate_proj", "up_proj"), "model.layers.{layer}.mlp.gate_up_proj.{leaf}"),
}


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    return {"sliding_windows": (table.integer("sliding_window", None, low=1),) * num_layers}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": next(filter(None, config.sliding_windows), None)}


PHI3 = Family(
    architecture="Phi3ForCausalLM", num_kv_heads=None, max_positions=4096, bos_token_id=1, eos_token_id=32000,
    pad_token_id=32000, norm_eps=1e-5, tensor_names=NAMES, fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    rope=RopeKeys(
        partial=True, original=4096, kinds={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
    ),
    read=_read, write=_write,
)  # fmt: skip
