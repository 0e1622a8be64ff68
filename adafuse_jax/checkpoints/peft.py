"""A LoRA from and to the two files of a PEFT directory (huggingface/peft).

adapter_config.json          r, lora_alpha, target_modules, …
adapter_model.safetensors    base_model.model.model.layers.<l>.mlp.up_proj.lora_A.weight [R, in], .lora_B.weight [out, R]

In both, y = W x + (α/R) · B A x; rank-stabilised LoRA, (α/√R) · B A x, becomes α·√R here. `peft_modules` has which modules
are adapted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, write_adapter_files
from adafuse_jax.checkpoints.peft_modules import AdaptedModules
from adafuse_jax.checkpoints.safetensors_files import read_tensors
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.registry import FAMILIES

log = logging.getLogger(__name__)

NAME = re.compile(
    r"base_model\.model\.(?P<prefix>|model\.|language_model\.model\.|model\.language_model\.)layers\.\d+\."
    r"(?P<module>.+)\.lora_[AB]\.weight"
)
"""Names of tensors; the last two prefixes are of models that read images too."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "lora_bias": (False,), "bias": ("none",), "modules_to_save": ([],), "layer_replication": ([],),
    "trainable_token_indices": ([], {}), "target_parameters": ([],),
    "fan_in_fan_out": (False,), "use_qalora": (False,), "use_bdlora": (False,), "alora_invocation_tokens": ([],),
    "arrow_config": (), "kasa_config": (), "monteclora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the backbone
}  # fmt: skip
"""Variants of LoRA that have other mathematics → the values that leave it plain; None and absence do too."""

INERT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
"""Keys that leave the function as it is."""


def modules_of(model_type: str) -> dict[str, tuple[str, ...]]:
    """Module of a layer, for instance mlp.up_proj, as the family's files name it → its linears, one below the other."""
    family = FAMILIES[model_type]
    found: dict[str, tuple[str, ...]] = {}
    for linear in LINEARS:
        name = family.tensor_name(("layers", linear, "weight")).removeprefix("model.layers.{}.").removesuffix(".weight")
        found[name] = (*found.get(name, ()), linear)
    return found


def tensor_name(layer: int, module: str, factor: str, *, prefix: str = "model.") -> str:
    return f"base_model.model.{prefix}layers.{layer}.{module}.lora_{factor}.weight"


def load_peft_lora(directory: Path, table: Table, model: ModelConfig, *, dtype: jnp.dtype) -> LoRA:
    """The LoRA in a PEFT directory whose adapter_config.json is `table`, its factors cast to `dtype`. Keys of the file that
    are not known are named in the log.

    Modules of several ranks get the largest, R, and one scale, s:  s_m B_m A_m = s [s_m/s B_m, 0] [A_m; A_any]. Those of
    layers that are not adapted have B = 0.

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
            raise UserError(
                f"{table.where}: {name} {quoted(value)} is not supported; merge the adapter with PEFT (merge_and_unload, "
                "save_pretrained), and give the result as --model"
            )
    selection, dropout = AdaptedModules.read(table), table.number("lora_dropout", 0.0, low=0, high=1)
    if unknown := [name for name in table.unread() if name not in INERT]:
        log.info("%s", shortened(f"{table.where}: keys that are not used: {', '.join(unknown)}", 400))
    path = directory / WEIGHTS_FILE
    if not os.path.lexists(path) and any(directory.glob("*.bin")):
        raise UserError(f"{directory}: has no {WEIGHTS_FILE}; convert its .bin file to safetensors first")
    tensors = read_tensors(path)
    linears = modules_of(model.model_type)
    prefix, found = _modules_in(tensors, linears, path)
    _require_selected(selection, tensors, path)
    modules = {
        (layer, module): name
        for module in found
        for layer in range(model.num_layers)
        if selection.left_out_by(name := f"{prefix}layers.{layer}.{module}") is None
    }
    ranks = {selection.rank_of(name) for name in modules.values()} or {selection.rank}
    try:
        config = AdapterConfig(
            adapter="lora", targets=tuple(linear for module in found for linear in linears[module]), rank=max(ranks),
            dropout=dropout, alpha=selection.alpha_at(max(ranks)),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{table.where}: {error}") from error
    if len(ranks) > 1:
        log.info("%s: ranks from %d to %d, all stored as the largest", table.where, min(ranks), max(ranks))
    is_whole = len(ranks) == 1 and len(modules) == model.num_layers * len(found)
    factors = {linear: _initial_factors(model, linear, config.rank, is_whole) for linear in config.targets}
    for (layer, module), name in modules.items():
        rank, ratio = selection.rank_of(name), selection.scale_of(name) / selection.default_scale
        out_dims = [model.linear_shape(linear)[0] for linear in linears[module]]
        in_dim = model.linear_shape(linears[module][0])[1]
        a, b = (
            _take(tensors, tensor_name(layer, module, factor, prefix=prefix), shape, directory).astype(np.float32)
            for factor, shape in (("A", (rank, in_dim)), ("B", (sum(out_dims), rank)))
        )
        b = b if ratio == 1 else b * np.float32(ratio)
        for linear, rows in zip(linears[module], np.split(b, np.cumsum(out_dims)[:-1]), strict=True):
            factors[linear]["A"][layer, :rank] = a
            factors[linear]["B"][layer, :, :rank] = rows
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


def _modules_in(
    tensors: Iterable[str], linears: Mapping[str, tuple[str, ...]], path: Path
) -> tuple[str, tuple[str, ...]]:
    """The beginning of the tensors' names, before `layers`, and the modules of a layer that are among them."""
    prefixes, found = set(), set()
    for name in tensors:
        match = NAME.fullmatch(name)
        if match is None or match["module"] not in linears:
            modules = " ".join(module.rsplit(".", 1)[-1] for module in linears)
            raise UserError(
                f"{path}: tensor {shortened(name, 120)} is not of a LoRA of {modules}; no other is supported"
            )
        prefixes.add(match["prefix"])
        found.add(match["module"])
    if not found:
        raise UserError(f"{path}: holds no tensor; restore the file")
    if len(prefixes) > 1:
        raise UserError(f"{path}: holds layers under {' and '.join(map(quoted, sorted(prefixes)))}; restore the file")
    return prefixes.pop(), tuple(module for module in linears if module in found)


def _require_selected(selection: AdaptedModules, tensors: dict[str, np.ndarray], path: Path) -> None:
    """Raise `UserError` for a tensor of a module that the config does not select: PEFT leaves it out."""
    for tensor in sorted(tensors):
        module = tensor.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        if fault := selection.left_out_by(module):
            raise UserError(
                f"{path}: tensor {shortened(tensor, 120)} is of a module that {fault} in {CONFIG_FILE} leaves out; restore "
                "the files of one adapter"
            )


def _initial_factors(model: ModelConfig, linear: str, rank: int, is_whole: bool) -> dict[str, np.ndarray]:
    """Factors of all layers that change nothing, as before training: A ~ U(±1/√in), B = 0. Zeros if `is_whole`: the file has
    all of them."""
    (out_dim, in_dim), layers = model.linear_shape(linear), model.num_layers
    a, b = np.zeros((layers, rank, in_dim), np.float32), np.zeros((layers, out_dim, rank), np.float32)
    if not is_whole:
        bound = in_dim**-0.5
        a[:] = np.random.default_rng(0).uniform(-bound, bound, a.shape)
    return {"A": a, "B": b}


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], directory: Path) -> np.ndarray:
    where = f"{directory / WEIGHTS_FILE}: tensor {shortened(name, 120)}"
    if name not in tensors:
        raise UserError(f"{where} is missing, and {CONFIG_FILE} selects its module; restore the files of one adapter")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(
            f"{where} has shape {quoted(list(tensor.shape))}, {CONFIG_FILE} and the backbone say {list(shape)}; give "
            "--model the one that it was trained on"
        )
    return tensor


def save_peft_lora(lora: LoRA, out: Path, model: ModelConfig, *, backbone_name: str) -> None:
    """Write `lora`, of the backbone `model`, as a directory that PEFT loads. Raises `UserError` if `out` exists and is not
    an empty directory."""
    config, tensors, ranks = lora.config, {}, {}
    for module, linears in modules_of(model.model_type).items():
        if any(linear in lora.experts for linear in linears):
            a, b = _as_one_module(lora, model, linears)
            ranks[module.rsplit(".", 1)[-1]] = a.shape[1]
            for layer in range(model.num_layers):
                for factor, stack in (("A", a), ("B", b)):
                    tensors[tensor_name(layer, module, factor)] = np.ascontiguousarray(stack[layer])
    table: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    if larger := {name: rank for name, rank in ranks.items() if rank != config.rank}:
        table["rank_pattern"] = larger
        table["alpha_pattern"] = {name: config.scale * rank for name, rank in larger.items()}
    write_adapter_files(out, table, tensors, metadata={"format": "pt"})


def _as_one_module(lora: LoRA, model: ModelConfig, linears: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A [L, R', in] and B [L, Σ out, R'] of a module of several linears, one below the other: those of a common A stack
    their B; others have [A_1; A_2] and [B_1 0; 0 B_2]. One that is not adapted has B = 0."""
    factors = {
        factor: {
            name: np.asarray(getattr(lora.experts[name], factor)[...])[:, 0] for name in linears if name in lora.experts
        }
        for factor in "AB"
    }
    a, b = list(factors["A"].values()), factors["B"]
    if len(linears) == 1:
        return a[0], b[linears[0]]
    is_common, rank = all(np.array_equal(a[0], other) for other in a), lora.config.rank
    rows = np.cumsum([0, *(model.linear_shape(name)[0] for name in linears)])
    stacked = np.zeros((len(a[0]), rows[-1], rank if is_common else rank * len(a)), a[0].dtype)
    for number, (name, of_linear) in enumerate(b.items()):
        start, at = 0 if is_common else rank * number, linears.index(name)
        stacked[:, rows[at] : rows[at + 1], start : start + rank] = of_linear
    return a[0] if is_common else np.concatenate(a, axis=1), stacked
