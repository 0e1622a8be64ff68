"""A LoRA from and to the two files of a PEFT directory (huggingface/peft).

adapter_config.json          r, lora_alpha, target_modules, …
adapter_model.safetensors    base_model.model.model.layers.<l>.mlp.up_proj.lora_A.weight [R, in], .lora_B.weight [out, R]

In both, y = W x + (α/R) · B A x; rank-stabilised LoRA, (α/√R) · B A x, becomes α·√R here.
"""

from __future__ import annotations

import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.checkpoints.adapter_files import CONFIG_FILE, MAX_SIZE, WEIGHTS_FILE, write_adapter_files
from adafuse_jax.checkpoints.safetensors_files import read_tensors
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ATTENTION_LINEARS, LINEARS, ModelConfig

log = logging.getLogger(__name__)

NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "lora_bias": (False,), "bias": ("none",), "modules_to_save": ([],), "rank_pattern": ({},),
    "alpha_pattern": ({},), "layer_replication": ([],), "trainable_token_indices": ([], {}), "target_parameters": ([],),
    "fan_in_fan_out": (False,), "use_qalora": (False,), "use_bdlora": (False,), "alora_invocation_tokens": ([],),
    "arrow_config": (), "kasa_config": (), "monteclora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the backbone
}  # fmt: skip
"""Variants of LoRA that have other mathematics → the values that leave it plain; None and absence do too."""

INERT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
"""Keys that leave the function as it is."""


def tensor_name(layer: int, linear: str, factor: str) -> str:
    block = "self_attn" if linear in ATTENTION_LINEARS else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{linear}.lora_{factor}.weight"


def load_peft_lora(directory: Path, table: Table, model: ModelConfig, *, dtype: jnp.dtype) -> LoRA:
    """The LoRA in a PEFT directory whose adapter_config.json is `table`, its factors cast to `dtype`. Keys of the file that
    are not known are named in the log.

    Raises:
      UserError: another kind of adapter or a variant of LoRA; tensors that are missing, no part of a LoRA, not finite, or do
        not fit the backbone.
    """
    if table.get("peft_type") != "LORA":
        kind = quoted(table.get("peft_type"))
        raise UserError(f"{table.where}: peft_type {kind} is not supported; supported: LORA")
    for name, plain in PLAIN.items():
        value = table.get(name)
        if value is not None and value not in plain:
            raise UserError(f"{table.where}: {name} {quoted(value)} is not supported; give a plain LoRA")
    rank, alpha = table.integer("r", low=1, high=MAX_SIZE), table.number("lora_alpha", low=0, high=1e6, above=True)
    selection = {name: table.get(name) for name in ("target_modules", "layers_to_transform", "exclude_modules")}
    stabilised, dropout = table.boolean("use_rslora", False), table.number("lora_dropout", 0.0, low=0, high=1)
    if unknown := [name for name in table.unread() if name not in INERT]:
        log.info("%s", shortened(f"{table.where}: keys that are not used: {', '.join(unknown)}", 400))
    path = directory / WEIGHTS_FILE
    if not os.path.lexists(path) and any(directory.glob("*.bin")):
        raise UserError(f"{directory}: has no {WEIGHTS_FILE}; convert its .bin file to safetensors first")
    tensors = read_tensors(path)
    targets = _targets(tensors, path)
    _require_selected(selection, tensors, table, path)
    try:
        config = AdapterConfig(
            adapter="lora", targets=targets, rank=rank, dropout=dropout,
            alpha=alpha * (math.sqrt(rank) if stabilised else 1.0),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{table.where}: {error}") from error
    factors: dict[str, dict[str, np.ndarray]] = {}
    for linear in config.targets:
        out_dim, in_dim = model.linear_shape(linear)
        for factor, shape in (("A", (rank, in_dim)), ("B", (out_dim, rank))):
            layers = [
                _take(tensors, tensor_name(layer, linear, factor), shape, directory)
                for layer in range(model.num_layers)
            ]
            factors.setdefault(linear, {})[factor] = np.stack(layers).astype(np.float32)
    if tensors:
        raise UserError(
            f"{path}: tensor {shortened(sorted(tensors)[0], 120)} is of no layer of the backbone, which has "
            f"{model.num_layers}; give --model the one that it was trained on"
        )
    lora = jax.eval_shape(lambda: LoRA(config, model, rngs=nnx.Rngs(0)))
    for linear, expert in lora.experts.items():
        for factor, stack in factors[linear].items():
            setattr(expert, factor, getattr(expert, factor).replace(jnp.asarray(stack[:, None], dtype)))
    return lora


def _targets(tensors: dict[str, np.ndarray], path: Path) -> tuple[str, ...]:
    found = set()
    for name in tensors:
        match = NAME.fullmatch(name)
        if match is None or match[2] not in LINEARS:
            raise UserError(
                f"{path}: tensor {shortened(name, 120)} is not of a LoRA of {' '.join(LINEARS)}; no other is supported"
            )
        found.add(match[2])
    if not found:
        raise UserError(f"{path}: holds no tensor; restore the file")
    return tuple(found)


def _require_selected(selection: dict[str, Any], tensors: dict[str, np.ndarray], table: Table, path: Path) -> None:
    """Raise `UserError` for a tensor of a linear that the config does not select: PEFT leaves it out. Patterns, which may
    take for ever to match, are not compared, with a line in the log."""
    if patterns := [key for key, value in selection.items() if isinstance(value, str) and value != "all-linear"]:
        log.info("%s: %s: a pattern is not used; the tensors say what is adapted", table.where, " and ".join(patterns))
    layers = selection["layers_to_transform"]
    layers = (
        {str(layer) for layer in layers} if isinstance(layers, list) else layers if layers is None else {str(layers)}
    )

    def is_named(module: str, names: list[Any]) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in names)

    for key in ("target_modules", "exclude_modules"):
        if not isinstance(selection[key], list | str | None):
            raise table.error(key, "it must be a list of names, or a pattern")
    targets, excluded = selection["target_modules"], selection["exclude_modules"]
    for tensor in sorted(tensors):
        module = tensor.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        fault = "target_modules" if isinstance(targets, list) and not is_named(module, targets) else ""
        fault = "exclude_modules" if isinstance(excluded, list) and is_named(module, excluded) else fault
        if layers is not None and NAME.fullmatch(tensor)[1] not in layers:  # type: ignore[index] # `_targets` has matched
            fault = "layers_to_transform"
        if fault:
            raise UserError(
                f"{path}: tensor {shortened(tensor, 120)} is of a module that {fault} in {CONFIG_FILE} leaves out; restore "
                "the files of one adapter"
            )


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], directory: Path) -> np.ndarray:
    where = f"{directory / WEIGHTS_FILE}: tensor {name}"
    if name not in tensors:
        raise UserError(f"{where} is missing; only LoRAs of all layers are supported")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(
            f"{where} has shape {quoted(list(tensor.shape))}, {CONFIG_FILE} and the backbone say {list(shape)}; give "
            "--model the one that it was trained on"
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
