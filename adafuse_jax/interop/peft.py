"""A LoRA from and to the two files of a PEFT directory (huggingface/peft).

adapter_config.json          r, lora_alpha, target_modules, …
adapter_model.safetensors    base_model.model.model.layers.<l>.mlp.up_proj.lora_A.weight [R, in], .lora_B.weight [out, R]

In both, y = W x + (α/R) · B A x; rank-stabilised LoRA, (α/√R) · B A x, becomes α·√R here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from adafuse_jax.adapters.directory import CONFIG_FILE, WEIGHTS_FILE, write_adapter_files
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.configs import ATTENTION_LINEARS, LINEARS, AdapterConfig, ModelConfig
from adafuse_jax.core.errors import UserError
from adafuse_jax.interop.huggingface import readable

NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "lora_bias": (False,), "bias": ("none",), "modules_to_save": ([],), "rank_pattern": ({},),
    "alpha_pattern": ({},), "layer_replication": ([],), "trainable_token_indices": ([], {}), "target_parameters": ([],),
    "fan_in_fan_out": (False,), "use_qalora": (False,), "use_bdlora": (False,), "alora_invocation_tokens": ([],),
    "arrow_config": (), "kasa_config": (), "monteclora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the backbone
}  # fmt: skip
"""Variants of LoRA that have other mathematics → the values that leave it plain; None and absence do too."""


def tensor_name(layer: int, linear: str, factor: str) -> str:
    block = "self_attn" if linear in ATTENTION_LINEARS else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{linear}.lora_{factor}.weight"


def load_peft_lora(directory: Path, table: dict[str, Any], model: ModelConfig, *, dtype: jnp.dtype) -> LoRA:
    """The LoRA in a PEFT directory whose adapter_config.json is `table`, its factors cast to `dtype`.

    Raises:
      UserError: another kind of adapter or a variant of LoRA; tensors that are missing, no part of a LoRA, or do not fit the
        backbone.
    """
    path = directory / CONFIG_FILE
    if table["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type {table['peft_type']!r} is not supported; supported: LORA")
    for name, plain in PLAIN.items():
        value = table.get(name)
        if value is not None and value not in plain:
            raise UserError(f"{path}: {name} {value!r} is not supported; give a plain LoRA")
    rank, alpha = table.get("r"), table.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}; they must be numbers, restore the file")
    if not (directory / WEIGHTS_FILE).exists() and list(directory.glob("*.bin")):
        raise UserError(f"{directory}: has no {WEIGHTS_FILE}; convert its .bin file to safetensors first")
    with readable(directory / WEIGHTS_FILE):
        tensors = load_file(directory / WEIGHTS_FILE)
    targets = _targets(tensors, directory / WEIGHTS_FILE)
    try:
        config = AdapterConfig(
            adapter="lora", targets=targets, rank=rank,
            alpha=float(alpha) * (math.sqrt(rank) if table.get("use_rslora") else 1.0),
            dropout=float(table.get("lora_dropout") or 0.0),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    lora = jax.eval_shape(lambda: LoRA(config, model, rngs=nnx.Rngs(0)))
    for linear, expert in lora.experts.items():
        for factor in ("A", "B"):
            leaf = getattr(expert, factor)
            stack = np.zeros((leaf.shape[0], *leaf.shape[2:]), np.float32)
            for layer in range(model.num_layers):
                stack[layer] = _take(tensors, tensor_name(layer, linear, factor), stack.shape[1:], directory)
            setattr(expert, factor, leaf.replace(jnp.asarray(stack[:, None], dtype)))
    if tensors:
        raise UserError(
            f"{directory / WEIGHTS_FILE}: tensor {sorted(tensors)[0]} is of no layer of the backbone, which has "
            f"{model.num_layers}; give --model the one that it was trained on"
        )
    return lora


def _targets(tensors: dict[str, np.ndarray], path: Path) -> tuple[str, ...]:
    found = set()
    for name in tensors:
        match = NAME.fullmatch(name)
        if match is None or match[2] not in LINEARS:
            raise UserError(f"{path}: tensor {name} is not of a LoRA of {' '.join(LINEARS)}; no other is supported")
        found.add(match[2])
    if not found:
        raise UserError(f"{path}: holds no tensor; restore the file")
    return tuple(found)


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], directory: Path) -> np.ndarray:
    where = f"{directory / WEIGHTS_FILE}: tensor {name}"
    if name not in tensors:
        raise UserError(f"{where} is missing; only LoRAs of all layers are supported")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(
            f"{where} has shape {list(tensor.shape)}, {CONFIG_FILE} and the backbone say {list(shape)}; give --model the "
            "one that it was trained on"
        )
    return tensor


def save_peft_lora(lora: LoRA, out: Path, *, backbone_name: str) -> None:
    """Write `lora` as a directory that PEFT loads. Raises `UserError` if `out` exists and is not an empty directory."""
    config = lora.config
    table = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    tensors = {
        tensor_name(layer, linear, factor): np.ascontiguousarray(stack[layer, 0])
        for linear, expert in lora.experts.items()
        for factor, stack in (("A", np.asarray(expert.A[...])), ("B", np.asarray(expert.B[...])))
        for layer in range(len(stack))
    }
    write_adapter_files(out, table, tensors, metadata={"format": "pt"})
