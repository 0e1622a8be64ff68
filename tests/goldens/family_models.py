"""Random tiny models of the families whose blocks are not Llama's: three configurations of each, in Hugging Face form.

Weights are drawn as those of `tiny_models`, from (case name, tensor name) alone; norms of Gemma, whose weight is that of
1 + w, are 0.2 · N(0, 1). The lengths of a case's prompts lie around the chunks in which prompts are read, and all are longer
than its windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from goldens.tiny_models import Case, drawn, model_shapes, write_json, write_tensors

VOCAB_SIZE = 64
LENGTHS = ((15, 16, 17, 63, 65), (64, 127, 129, 257, 255, 383, 385), (513, 1023, 1025, 511, 767, 769))
"""Tokens of the prompts of a family's first, second and third case."""
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 16.0, "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.1, "beta_fast": 4.0}  # fmt: skip
FAMILIES: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    "granite": ("GraniteForCausalLM", (
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 0.5},
        {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 1.5, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 24, "embedding_multiplier": 3.0, "logits_scaling": 0.3,
         "hidden_act": "gelu", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    )),
    "olmo2": ("Olmo2ForCausalLM", ({}, {"attention_bias": True, "num_key_value_heads": 4}, {"rms_norm_eps": 1e-2})),
    "smollm3": ("SmolLM3ForCausalLM", (
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True},
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 24,
         "tie_word_embeddings": True},
    )),
    "gemma3_text": ("Gemma3ForCausalLM", (
        {"num_hidden_layers": 3, "head_dim": 32, "sliding_window": 6, "sliding_window_pattern": 3,
         "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        {"num_hidden_layers": 2, "sliding_window": 20, "layer_types": ["full_attention", "sliding_attention"],
         "query_pre_attn_scalar": 7, "final_logit_softcapping": 3.0, "rope_theta": 500.0, "rope_local_base_freq": 50.0,
         "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "attention_bias": True},
        {"num_hidden_layers": 2, "sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}},
    )),
    "gemma2": ("Gemma2ForCausalLM", (
        {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {"sliding_window": 20, "num_hidden_layers": 3, "query_pre_attn_scalar": 24, "attention_bias": True},
        {"sliding_window": 100, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 32},
    )),
    "phi3": ("Phi3ForCausalLM", (
        {"sliding_window": 6}, {"num_key_value_heads": 4, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        {"sliding_window": 100},
    )),
    "seed_oss": ("SeedOssForCausalLM", (
        {}, {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": 24},
        {"tie_word_embeddings": True, "head_dim": None},
    )),
    "exaone4": ("Exaone4ForCausalLM", (
        {"num_hidden_layers": 4, "sliding_window": 6},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
        {"num_hidden_layers": 3, "sliding_window": 100, "sliding_window_pattern": "LLG", "head_dim": 24,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    )),
    "olmo3": ("Olmo3ForCausalLM", (
        {"num_hidden_layers": 4, "sliding_window": 6},
        {"sliding_window": 20, "layer_types": ["full_attention", "sliding_attention"], "rope_theta": 100.0},
        {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"], "attention_bias": True,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}},
    )),
    "glm4": ("Glm4ForCausalLM", (
        {}, {"attention_bias": False, "partial_rotary_factor": 0.25, "head_dim": 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
         "tie_word_embeddings": True},
    )),
    "cohere2": ("Cohere2ForCausalLM", (
        {"num_hidden_layers": 4, "sliding_window": 6, "logit_scale": 0.5},
        {"sliding_window": 20, "sliding_window_pattern": 2, "attention_bias": True, "tie_word_embeddings": True},
        {"sliding_window": 100, "layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 4},
    )),
    "ministral3": ("Ministral3ForCausalLM", (
        {"sliding_window": 6, "rope_parameters": YARN},
        {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}, "head_dim": 24},
        {"rope_parameters": YARN | {"original_max_position_embeddings": 256, "llama_4_scaling_beta": 0.3},
         "tie_word_embeddings": True},
    )),
}  # fmt: skip
"""`model_type` → its class and three configurations, beside those that all have."""


def _case(model_type: str, index: int) -> Case:
    architecture, changes = FAMILIES[model_type]
    gemma, cohere = model_type.startswith("gemma"), model_type == "cohere2"
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "layer_norm_eps" if cohere else "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    return Case(name=f"{model_type}_{index}", config=config | changes[index])


CASES: dict[str, Case] = {f"{name}_{i}": _case(name, i) for name in FAMILIES for i in range(3)}


def lengths(case: Case) -> tuple[int, ...]:
    """Tokens of the case's prompts."""
    return LENGTHS[int(case.name[-1])]


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names of a `config.json` -> shapes ([out, in] for linears)."""
    family = config["model_type"]
    d, f = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"] or d // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    attention_bias = config.get("attention_bias", family in ("seed_oss", "glm4"))
    o_bias = config.get("attention_out_bias", False) if family == "seed_oss" else attention_bias and family != "glm4"
    linears: dict[str, tuple[tuple[int, int], bool]] = {}
    if family == "phi3":
        linears["self_attn.qkv_proj"] = (q + 2 * kv, d), False
    else:
        linears |= {f"self_attn.{name}_proj": ((n, d), attention_bias) for name, n in (("q", q), ("k", kv), ("v", kv))}
    linears["self_attn.o_proj"] = (d, q), o_bias
    mlp_bias = config.get("mlp_bias", False)
    if family in ("phi3", "glm4"):
        linears["mlp.gate_up_proj"] = (2 * f, d), False
    else:
        linears |= {f"mlp.{name}_proj": ((f, d), mlp_bias) for name in ("gate", "up")}
    linears["mlp.down_proj"] = (d, f), mlp_bias
    block = {
        "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
        "glm4": ("input", "post_self_attn", "post_attention", "post_mlp"),
        "cohere2": ("input",),
        **dict.fromkeys(("olmo2", "olmo3", "exaone4"), ("post_attention", "post_feedforward")),
    }
    names = block["gemma2"] if family == "gemma3_text" else block.get(family, ("input", "post_attention"))
    norms = {f"{name}_layernorm": d for name in names}
    if family in ("olmo2", "olmo3"):
        norms |= {"self_attn.q_norm": q, "self_attn.k_norm": kv}
    elif family in ("gemma3_text", "exaone4"):
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}

    return model_shapes(config, linears, norms)


def weights(case: Case) -> dict[str, np.ndarray]:
    """Weights of a case; each depends on (case name, tensor name) alone."""
    norm_mean = 0 if case.config["model_type"].startswith("gemma") else 1
    return drawn(case, tensor_shapes(case.config), norm_mean=norm_mean)


def write_model_dir(case: Case, out: Path) -> Path:
    """Write `config.json` and the weights of a case into `out`; returns `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(case.config, out / "config.json")
    write_tensors(weights(case), out)
    return out
