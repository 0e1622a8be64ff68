"""Random LoRAs of two tiny models. NumPy only: the reference environment and the project's share this file."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

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


def factors(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The LoRA of a model of tensors of `shapes`: `model.layers.0.self_attn.q_proj.lora_A.weight` [R, in] and so on, in
    float32. Each depends on its name alone."""
    case, tensors = LORAS[name], {}
    for weight, shape in shapes.items():
        module = weight.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in case.targets and weight.endswith(".weight"):
            for factor, size in (("A", (case.rank, shape[1])), ("B", (shape[0], case.rank))):
                key = f"{module}.lora_{factor}.weight"
                rng = np.random.default_rng(zlib.crc32(f"{name}/{key}".encode()))
                tensors[key] = rng.standard_normal(size, dtype=np.float32) / np.sqrt(size[1], dtype=np.float32)
    return tensors
