"""config.json and generation_config.json ↔ `ModelConfig`, for the families whose mathematics the backbone has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adafuse_jax.configs import ModelConfig, RopeConfig
from adafuse_jax.core.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_KINDS = ("default", "linear", "llama3")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `UserError` if it is absent, unreadable, or not an object."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a complete directory") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds a JSON {type(table).__name__}, not an object; restore the file")
    return table


def read_model_config(directory: Path) -> ModelConfig:
    """The shapes of the model in `directory`. Special tokens of generation_config.json win over config.json's.

    Raises:
      UserError: a missing or corrupt file or key, or a model type, rope type, activation or quantisation that is not
        supported.
    """
    path = directory / "config.json"
    table = read_json(path)
    generation = directory / "generation_config.json"
    special = table | (read_json(generation) if generation.exists() else {})
    model_type = table.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if table.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act {table['hidden_act']!r} is not supported; supported: silu")
    if table.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantised; give an unquantised (bf16, fp16 or fp32) model")

    def size(name: str, default: int | None = None) -> int:
        value = default if table.get(name) is None else table[name]
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{path}: {name} is {value!r}; it must be a positive integer")
        return value

    num_heads, num_layers, embed_dim = size("num_attention_heads"), size("num_hidden_layers"), size("hidden_size")
    num_kv_heads = size("num_key_value_heads", 8 if model_type == "mistral" else num_heads)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{path}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    biased = bool(table.get("attention_bias", False))
    eos = special.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not all(isinstance(token, int) for token in eos_ids):
        raise UserError(f"{path}: eos_token_id is {eos!r}; it must be an integer or a list of them")
    return ModelConfig(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        embed_dim=embed_dim,
        hidden_dim=size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size("head_dim", 128 if model_type == "qwen3" else embed_dim // num_heads),
        max_position_embeddings=size("max_position_embeddings", 2048),
        norm_eps=_number(table, "rms_norm_eps", 1e-6, path),
        rope=_rope(table, path),
        tie_word_embeddings=bool(table.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2" or (biased and model_type != "mistral"),
        o_bias=biased and model_type in ("llama", "qwen3"),
        mlp_bias=bool(table.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(table, num_layers, path),
        bos_token_id=special.get("bos_token_id"),
        eos_token_ids=eos_ids,
        pad_token_id=special.get("pad_token_id"),
    )


def _number(table: dict[str, Any], name: str, default: float | None, path: Path) -> float:
    value = table.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: {name} is {value!r}; it must be a number")
    return value


def _rope(table: dict[str, Any], path: Path) -> RopeConfig:
    """Both spellings: `rope_theta` + `rope_scaling`, and the newer `rope_parameters`; the older one wins, as upstream."""
    parameters = table.get("rope_scaling") or table.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(f"{path}: rope parameters {parameters!r} are not supported; give one table for all layers")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UserError(f"{path}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    if (table.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is not supported; supported: 1")
    theta = _number(parameters if "rope_theta" in parameters else table, "rope_theta", 10000.0, path)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = _number(parameters, "factor", None, path)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    original = parameters if "original_max_position_embeddings" in parameters else table
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=factor,
        low_freq_factor=_number(parameters, "low_freq_factor", None, path),
        high_freq_factor=_number(parameters, "high_freq_factor", None, path),
        original_max_position_embeddings=int(_number(original, "original_max_position_embeddings", None, path)),
    )


def _sliding_windows(table: dict[str, Any], num_layers: int, path: Path) -> tuple[int | None, ...]:
    """Each layer's window: what `layer_types` says, else all layers of Mistral and the later ones of Qwen."""
    model_type, window = table["model_type"], table.get("sliding_window", 4096)
    uses = model_type == "mistral" or (model_type in ("qwen2", "qwen3") and table.get("use_sliding_window", False))
    window = window if uses else None
    layer_types = table.get("layer_types") if model_type in ("qwen2", "qwen3") else None
    if layer_types is None:
        first = 0 if model_type == "mistral" else table.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    kinds = ("full_attention", "sliding_attention")
    if len(layer_types) != num_layers or any(kind not in kinds for kind in layer_types):
        raise UserError(
            f"{path}: layer_types must name {num_layers} layers, each {' or '.join(kinds)}; restore the file"
        )
    if "sliding_attention" in layer_types and window is None:
        raise UserError(f"{path}: layer_types has sliding_attention but no sliding_window is in use; restore the file")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json table of `config`, weights stored as `dtype`."""
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling = dict(
            scaling or {},
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position_embeddings=rope.original_max_position_embeddings,
        )
    windows = [w for w in config.sliding_windows if w]
    eos = list(config.eos_token_ids)
    table: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.o_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    }
    if config.model_type == "llama":
        table["mlp_bias"] = config.mlp_bias
    else:
        table["sliding_window"] = windows[0] if windows else None
    if config.model_type in ("qwen2", "qwen3"):
        table["use_sliding_window"] = bool(windows)
        table["layer_types"] = ["sliding_attention" if w else "full_attention" for w in config.sliding_windows]
    return table
