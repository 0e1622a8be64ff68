"""Random LoRAs of tiny models: plain ones, and of configs that select modules one by one.

NumPy only: the reference environment and the project's share this file.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoRACase:
    """A LoRA of the tiny model `model`: y = W x + s B A x with s = alpha / rank, or alpha / √rank if `rslora`."""

    model: str
    targets: tuple[str, ...]
    rank: int
    alpha: int
    rslora: bool = False


LORAS = {
    "all_linears": LoRACase(model="llama_gqa_tied", targets=ATTENTION + FFN, rank=4, alpha=6),
    "rank_stabilised": LoRACase(
        model="qwen2_window", targets=("q_proj", "v_proj", "down_proj"), rank=3, alpha=2, rslora=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A LoRA of the tiny model `model`, by the arguments of PEFT's `LoraConfig`."""

    model: str
    arguments: dict[str, Any] = field(hash=False)


VARIANTS = {
    "patterns": Variant(
        model="llama_mqa_sharded",
        arguments={
            "r": 4, "lora_alpha": 2, "target_modules": [*ATTENTION, *FFN],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "model.layers.2.self_attn.o_proj": 1},
            "alpha_pattern": {"k_proj": 9, r"model\.layers\.[02]\.mlp\.\w+": 3},
        },
    ),
    "some_layers": Variant(
        model="qwen3_bias",
        arguments={
            "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [0, 2],
            "layers_pattern": "layers", "use_rslora": True, "rank_pattern": {"up_proj": 5},
        },
    ),
    "expression": Variant(
        model="qwen3_bias",
        arguments={
            "r": 2, "lora_alpha": 4, "target_modules": r".*layers\.(0|2)\..*(q|o|down)_proj",
            "exclude_modules": r".*\.2\.self_attn\.o_proj",
        },
    ),
    "all_linear": Variant(
        model="llama_gqa_tied",
        arguments={"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "exclude_modules": ["gate_proj", "k_proj"]},
    ),
}  # fmt: skip
VARIANTS["fused"] = Variant(
    model="phi3_0",
    arguments={
        "r": 2, "lora_alpha": 3, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"],
        "rank_pattern": {"gate_up_proj": 3},
    },
)  # fmt: skip
CHANGING = {
    "dora": Variant(
        model="qwen3_bias",
        arguments={
            "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [0, 2],
            "use_dora": True, "rank_pattern": {"up_proj": 2},
        },
    ),
    "biases": Variant(
        model="qwen2_window",
        arguments={"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "head": Variant(
        model="llama_gqa_tied",
        arguments={"r": 2, "lora_alpha": 4, "target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
    ),
    "embedding": Variant(
        model="llama_gqa_tied",
        arguments={"r": 2, "lora_alpha": 4, "target_modules": ["down_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "dora_fused": Variant(
        model="glm4_0",
        arguments={"r": 2, "lora_alpha": 3, "target_modules": ["v_proj", "gate_up_proj"], "use_dora": True},
    ),
    "head_and_embedding": Variant(
        model="gemma3_text_0",
        arguments={
            "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
        },
    ),
}  # fmt: skip
"""Adapters that change the backbone's own weights too."""
WITH_ARGUMENTS = VARIANTS | CHANGING
EXPORTED = (*LORAS, "fused")
"""Adapters that the project exports again, for PEFT to read."""


def drawn(name: str, key: str, size: tuple[int, ...]) -> np.ndarray:
    """A tensor in float32, which depends on its name alone."""
    rng = np.random.default_rng(zlib.crc32(f"{name}/{key}".encode()))
    return rng.standard_normal(size, dtype=np.float32) / np.sqrt(size[-1], dtype=np.float32)


def factors(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The LoRA of a model of tensors of `shapes`: `model.layers.0.self_attn.q_proj.lora_A.weight` [R, in] and so on, in
    float32. Each depends on its name alone."""
    case, tensors = LORAS[name], {}
    for weight, shape in shapes.items():
        module = weight.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in case.targets and weight.endswith(".weight"):
            for factor, size in (("A", (case.rank, shape[1])), ("B", (shape[0], case.rank))):
                key = f"{module}.lora_{factor}.weight"
                tensors[key] = drawn(name, key, size)
    return tensors
