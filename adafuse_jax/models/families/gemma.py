"""Gemma 2 and Gemma 3 (text): norms (1 + w) x / rms(x) on both sides of every block, embeddings times √D, GeGLU, windows in
all but every few layers. Gemma 2 has soft caps; Gemma 3 has norms of q and k, and a RoPE of its own in layers with a window.
"""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig, RopeConfig
from adafuse_jax.models.families.family import POST_NORM_NAMES, Family, patterned_windows, write_pattern
from adafuse_jax.models.families.rope import RopeKeys

SHARED: dict[str, Any] = {
    "num_kv_heads": 4, "head_dim": 256, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "tied": True,
    "keys": {"hidden_act": "hidden_activation"}, "activation": "gelu_pytorch_tanh", "tensor_names": POST_NORM_NAMES,
}  # fmt: skip


def _read(table: Table, num_layers: int, pattern: int) -> dict[str, Any]:
    biased = table.boolean("attention_bias", False)
    return {
        "norm": "rms_1p",
        "norm_placement": "both",
        "embedding_multiplier": table.integer("hidden_size", low=1) ** 0.5,
        "attention_multiplier": table.number("query_pre_attn_scalar", 256, low=0, above=True) ** -0.5,
        "sliding_windows": patterned_windows(table, num_layers, pattern),
        "qkv_bias": biased,
        "o_bias": biased,
    }


def _softcap(table: Table, name: str, default: float | None) -> float | None:
    """A soft cap; null is none."""
    return table.number(name, None if name in table.values else default, low=0, above=True)


def _write(config: ModelConfig) -> dict[str, Any]:
    multiplier = config.attention_multiplier
    scalar = config.head_dim if multiplier is None else float(f"{multiplier**-2:.12g}")
    return {
        "attention_bias": config.o_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "final_logit_softcapping": config.logit_softcap,
        **write_pattern(config),
    }


def _read_gemma2(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    softcaps = {
        "attention_softcap": _softcap(table, "attn_logit_softcapping", 50.0),
        "logit_softcap": _softcap(table, "final_logit_softcapping", 30.0),
    }
    return _read(table, num_layers, pattern=2) | softcaps


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    return _write(config) | {"attn_logit_softcapping": config.attention_softcap}


def _read_gemma3(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    softcap = _softcap(table, "final_logit_softcapping", None)
    pattern = table.integer("sliding_window_pattern", 6, low=1)
    return _read(table, num_layers, pattern) | {"qk_norm": True, "logit_softcap": softcap}


GEMMA2 = Family(architecture="Gemma2ForCausalLM", max_positions=8192, read=_read_gemma2, write=_write_gemma2, **SHARED)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM", max_positions=131072, read=_read_gemma3, write=_write, **SHARED,
    text_defaults={"vocab_size": 262208, "num_attention_heads": 8, "hidden_size": 2304, "intermediate_size": 9216,
                   "num_hidden_layers": 26},
    rope=RopeKeys(defaults=RopeConfig(theta=1e6)), local_rope=RopeKeys(theta_key="rope_local_base_freq"),
)  # fmt: skip
