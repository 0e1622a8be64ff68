"""Random tiny models in Hugging Face form, one per feature of the four supported families.

Each case is a `config.json` and, drawn from (case name, tensor name) alone, the weights it asks for:

    linear   W [out, in] ~ gain · N(0, 1/in)      bias   b [out] ~ 0.3 · N(0, 1)
    norm     g [n]       ~ 1 + 0.2 · N(0, 1)      embed  E [V, D] ~ N(0, 1), or N(0, 1/D) where it is the head too

so that the logits have a standard deviation of order one and no norm, bias or window can be left out unnoticed.
NumPy, safetensors and ml_dtypes only: the reference environment (Python 3.11, torch) and the project's share this file.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # With 16-wide heads the wavelengths 6, 32 and 167 fall one in each of the three bands (< 16, between, > 64).
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model: its `config.json` and the way its weights lie on disk."""

    name: str
    config: dict[str, Any] = field(hash=False)
    num_shards: int = 1
    dtype: str = "float32"


def _case(name: str, *, num_shards: int = 1, dtype: str = "float32", without: tuple[str, ...] = (), **changes) -> Case:
    family = name.split("_")[0]
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    config |= changes
    for key in without:
        del config[key]
    return Case(name=name, config=config, num_shards=num_shards, dtype=dtype)


_NEW_ROPE = ("rope_theta",)  # keys that the `rope_parameters` style of transformers 5 no longer writes

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _case("llama_mha", hidden_size=48, without=("num_key_value_heads",)),
        _case("llama_gqa_tied", num_attention_heads=8, tie_word_embeddings=True, rope_scaling=None, rms_norm_eps=1e-2),
        _case("llama_mqa_sharded", num_key_value_heads=1, num_hidden_layers=3, num_shards=3),
        _case("llama_bias", attention_bias=True, mlp_bias=True),
        _case("llama_head_dim", hidden_size=48, head_dim=16, rope_theta=500.0),
        _case("llama_bfloat16", tie_word_embeddings=True, dtype="bfloat16"),
        _case("llama_linear_old", rope_scaling={"type": "linear", "factor": 4.0}),
        _case(
            "llama_linear_new",
            rope_parameters={"rope_type": "linear", "rope_theta": 2000.0, "factor": 2.5},
            without=_NEW_ROPE,
        ),
        _case("llama_llama3_old", rope_theta=500000.0, rope_scaling=LLAMA3),
        _case("llama_llama3_new", rope_parameters={"rope_theta": 500000.0, **LLAMA3}, without=_NEW_ROPE),
        _case(  # both places name a length: the outer one counts
            "llama_llama3_outer",
            rope_theta=500000.0,
            rope_scaling=LLAMA3,
            original_max_position_embeddings=32,
        ),
        _case(  # no place does: max_position_embeddings is taken
            "llama_llama3_absent",
            rope_theta=500000.0,
            rope_scaling={k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
        ),
        _case("llama_float16", num_key_value_heads=1, dtype="float16"),
        _case("llama_default_new", rope_parameters={"rope_type": "default", "rope_theta": 300.0}, without=_NEW_ROPE),
        _case("mistral_window", sliding_window=8, rope_theta=1000.0, rms_norm_eps=1e-3),
        _case(  # transformers reads it as Ministral, whose head_dim must be given
            "mistral_layer_types",
            num_hidden_layers=4,
            head_dim=16,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        _case("mistral_head_dim", sliding_window=None, hidden_size=48, head_dim=20, num_key_value_heads=4),
        _case(
            "qwen2_tied",  # a window that `use_sliding_window` turns off
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=6,
            max_window_layers=1,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
        ),
        _case("qwen2_window", num_hidden_layers=4, use_sliding_window=True, sliding_window=6, max_window_layers=2),
        _case(
            "qwen2_layer_types",
            num_hidden_layers=4,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            without=_NEW_ROPE,
        ),
        _case("qwen3_tied", head_dim=24, tie_word_embeddings=True, rms_norm_eps=1e-6, attention_bias=False),
        _case("qwen3_bias", head_dim=20, attention_bias=True, num_hidden_layers=3, rms_norm_eps=1e-3),
        _case(
            "qwen3_window",
            hidden_size=48,
            head_dim=16,
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
        ),
    )
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names of a `config.json` -> shapes ([out, in] for linears)."""
    family = config["model_type"]
    d, f = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", d // heads)
    attention_bias = config.get("attention_bias", False)
    linears = {
        "self_attn.q_proj": ((heads * head_dim, d), attention_bias or family == "qwen2"),
        "self_attn.k_proj": ((kv_heads * head_dim, d), attention_bias or family == "qwen2"),
        "self_attn.v_proj": ((kv_heads * head_dim, d), attention_bias or family == "qwen2"),
        "self_attn.o_proj": ((d, heads * head_dim), attention_bias),
        "mlp.gate_proj": ((f, d), config.get("mlp_bias", False)),
        "mlp.up_proj": ((f, d), config.get("mlp_bias", False)),
        "mlp.down_proj": ((d, f), config.get("mlp_bias", False)),
    }
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if family == "qwen3":
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    return model_shapes(config, linears, norms)


def model_shapes(
    config: dict[str, Any], linears: dict[str, tuple[tuple[int, int], bool]], norms: dict[str, int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a model by Hugging Face's names: `linears` of a layer, with whether they have a bias, and its `norms`."""
    d, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (shape, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = (size,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    return shapes


def weights(case: Case) -> dict[str, np.ndarray]:
    """Weights of a case, of its dtype; each depends on (case name, tensor name) alone."""
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    return {name: draw.astype(dtype) for name, draw in drawn(case, tensor_shapes(case.config)).items()}


def drawn(case: Case, shapes: dict[str, tuple[int, ...]], norm_mean: int = 1) -> dict[str, np.ndarray]:
    """Random tensors in float32, each from (case name, tensor name) alone; norms are `norm_mean` + 0.2 · N(0, 1)."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(f"{case.name}/{name}".encode()))
        draw = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith(".bias"):
            draw *= 0.3
        elif name.endswith("norm.weight"):
            draw = norm_mean + 0.2 * draw
        elif name != "model.embed_tokens.weight" or case.config["tie_word_embeddings"]:
            gain = 1.5 if "layers" in name else 1.0
            draw *= gain / np.sqrt(shape[1], dtype=np.float32)
        tensors[name] = draw
    return tensors


def write_tensors(tensors: dict[str, np.ndarray], out: Path, num_shards: int = 1) -> None:
    """`model.safetensors`, or that many shards with `model.safetensors.index.json`."""
    if num_shards == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = list(tensors)
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[shard::num_shards]  # interleaved: the tensors of one layer lie in several files
        save_file({name: tensors[name] for name in mine}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index, out / "model.safetensors.index.json")


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a model directory, from however many files."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_model_dir(case: Case, out: Path) -> Path:
    """Write `config.json`, `generation_config.json` and the weights of a case into `out`; returns `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(case.config, out / "config.json")
    write_json({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, out / "generation_config.json")
    write_tensors(weights(case), out, case.num_shards)
    return out
