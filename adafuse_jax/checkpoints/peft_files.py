"""The two files of a PEFT directory (huggingface/peft), read into the shapes of a backbone.

adapter_config.json          r, lora_alpha, target_modules, …
adapter_model.safetensors    base_model.model.model.layers.<l>.mlp.up_proj.lora_A.weight [R, in], .lora_B.weight [out, R]

In both, y = W x + (α/R) · B A x; rank-stabilised LoRA, (α/√R) · B A x, becomes α·√R here. `peft_modules` has which modules
are adapted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adafuse_jax.checkpoints.peft_modules import AdaptedModules
from adafuse_jax.checkpoints.safetensors_files import read_tensors
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.registry import FAMILIES

log = logging.getLogger(__name__)

NAME = re.compile(
    r"base_model\.model\.(?P<prefix>|model\.|language_model\.model\.|model\.language_model\.)layers\.\d+\."
    r"(?P<module>.+)\.(?:lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector)"
)
"""Names of tensors; the last two prefixes are of models that read images too."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "layer_replication": ([],), "trainable_token_indices": ([], {}), "target_parameters": ([],),
    "fan_in_fan_out": (False,), "use_qalora": (False,), "use_bdlora": (False,), "alora_invocation_tokens": ([],),
    "arrow_config": (), "kasa_config": (), "monteclora_config": (), "velora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the backbone
}  # fmt: skip
"""Variants of LoRA that have other mathematics → the values that leave it plain; None and absence do too."""

SAVED = ("embed_tokens", "lm_head")
"""Modules that may be saved whole."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAdapter:
    """The files of one adapter, by the linears of the backbone.

    `factors`: linear → {"A": [L, R, in], "B": [L, out, R]} of a LoRA of `config`. The others change the backbone's own
    weights: `magnitudes` of DoRA, [L, out], NaN in layers that are not adapted; `biases` to add, [L, out]; `saved` in place
    of the embedding and the head, [V, D], `keeps_tied_head` if a head tied to the embedding keeps what it was. `beyond`
    names the keys or tensors that make it more than a LoRA.
    """

    where: str
    config: AdapterConfig
    factors: dict[str, dict[str, np.ndarray]]
    magnitudes: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]
    saved: dict[str, np.ndarray]
    keeps_tied_head: bool
    beyond: tuple[str, ...]


def read_peft(directory: Path, table: Table, model: ModelConfig) -> PeftAdapter:
    """The adapter in a PEFT directory whose adapter_config.json is `table`. Keys of the file that are not known are named in
    the log.

    Modules of several ranks get the largest, R, and one scale, s:  s_m B_m A_m = s [s_m/s B_m, 0] [A_m; A_any]. Those of
    layers that are not adapted have B = 0.

    Raises:
      UserError: another kind of adapter or a variant of LoRA; tensors that are missing, no part of a LoRA, not finite, or do
        not fit the backbone.
    """
    require_lora(table)
    selection, dropout = AdaptedModules.read(table), table.number("lora_dropout", 0.0, low=0, high=1)
    beyond = beyond_lora(table)
    if unknown := [name for name in table.unread() if name not in INERT]:
        log.info("%s", shortened(f"{table.where}: keys that are not used: {', '.join(unknown)}", 400))
    path = directory / WEIGHTS_FILE
    if not os.path.lexists(path) and any(directory.glob("*.bin")):
        raise UserError(f"{directory}: has no {WEIGHTS_FILE}; convert its .bin file to safetensors first")
    tensors, linears = read_tensors(path), modules_of(model.model_type)
    saved = _take_saved(tensors, model, table, path)
    prefix, found = _modules_in(tensors, linears, path)
    _require_selected(selection, tensors, path)
    modules = {
        (layer, module): name
        for module in found
        for layer in range(model.num_layers)
        if selection.left_out_by(name := f"{prefix}layers.{layer}.{module}") is None
    }
    settings = {name: selection.rank_and_scale(name) for name in modules.values()}
    ranks = {rank for rank, _ in settings.values()} or {selection.rank}
    if len(ranks) > 1:
        log.info("%s: ranks from %d to %d, all stored as the largest", table.where, min(ranks), max(ranks))
    try:
        config = AdapterConfig(
            adapter="lora", targets=tuple(linear for module in found for linear in linears[module]), rank=max(ranks),
            dropout=dropout, alpha=selection.alpha_at(max(ranks)),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{table.where}: {error}") from error
    is_whole = len(ranks) == 1 and len(modules) == model.num_layers * len(found)
    adapter = PeftAdapter(
        where=table.where,
        config=config,
        factors={linear: _initial_factors(model, linear, config.rank, is_whole) for linear in config.targets},
        magnitudes=_vectors(config, model, np.nan) if "use_dora" in beyond else {},
        biases=_vectors(config, model, 0.0) if "lora_bias" in beyond else {},
        saved=saved,
        keeps_tied_head=any(name.endswith("embed_tokens") for name in table.get("modules_to_save") or ()),
        beyond=beyond or tuple(f"tensor {name}" for name in saved),
    )
    for (layer, module), name in modules.items():
        rank, scale = settings[name]
        b_factor = scale / selection.default_scale
        _fill(adapter, model, layer, linears[module], partial(_take, tensors, name, path), rank, scale, b_factor)
    if tensors:
        raise UserError(
            f"{path}: tensor {shortened(sorted(tensors)[0], 120)} is of no layer of the backbone, which has "
            f"{model.num_layers}, or of no kind that {CONFIG_FILE} has; give --model the one that it was trained on"
        )
    return adapter


def require_lora(table: Table) -> None:
    """Raise `UserError` for another kind of adapter, or a variant of LoRA that is not computed here."""
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


def _fill(
    adapter: PeftAdapter,
    model: ModelConfig,
    layer: int,
    linears: tuple[str, ...],
    take: Callable[..., np.ndarray],
    rank: int,
    scale: float,
    b_factor: float,
) -> None:
    """Put the tensors of a module, which is `linears` one below the other, into the adapter. `take` gives the tensor of a
    name's end and a shape."""
    rows = [model.linear_shape(linear)[0] for linear in linears]
    a = take("lora_A.weight", rank, model.linear_shape(linears[0])[1])
    b = take("lora_B.weight", sum(rows), rank)
    b = b if b_factor == 1 else b * np.float32(b_factor)
    vectors = [(adapter.magnitudes, take("lora_magnitude_vector", sum(rows)))] if adapter.magnitudes else []
    vectors += [(adapter.biases, scale * take("lora_B.bias", sum(rows)))] if adapter.biases else []
    for linear, end, size in zip(linears, np.cumsum(rows), rows, strict=True):
        part = slice(end - size, end)
        adapter.factors[linear]["A"][layer, :rank] = a
        adapter.factors[linear]["B"][layer, :, :rank] = b[part]
        for stacked, vector in vectors:
            stacked[linear][layer] = vector[part]


def _vectors(config: AdapterConfig, model: ModelConfig, value: float) -> dict[str, np.ndarray]:
    """A vector [L, out] of each adapted linear."""
    return {
        name: np.full((model.num_layers, model.linear_shape(name)[0]), value, np.float32) for name in config.targets
    }


def beyond_lora(table: Table) -> tuple[str, ...]:
    """The keys of adapter_config.json by which an adapter is more than a LoRA, and changes the backbone's own weights."""
    found = [name for name in ("use_dora", "lora_bias") if table.boolean(name, False)]
    saved = table.items("modules_to_save", [])
    if not all(isinstance(name, str) and name.rsplit(".", 1)[-1] in SAVED for name in saved):
        raise table.error(
            "modules_to_save",
            f"supported: {', '.join(SAVED)}; merge the adapter with PEFT, and give the result as --model",
        )
    return (*found, *(["modules_to_save"] if saved else []))


def _take_saved(tensors: dict[str, np.ndarray], model: ModelConfig, table: Table, path: Path) -> dict[str, np.ndarray]:
    """The embedding and the head, if they are there."""
    found = {}
    for name in [name for name in tensors if name.endswith(tuple(f".{module}.weight" for module in SAVED))]:
        found[name.split(".")[-2]] = tensor = tensors.pop(name)
        if tensor.ndim != 2 or tensor.shape[1] != model.embed_dim:
            raise UserError(
                f"{path}: tensor {shortened(name, 120)} has shape {quoted(list(tensor.shape))}, and the backbone "
                f"{model.embed_dim} dimensions; give --model the one that it was trained on"
            )
    if missing := {name.rsplit(".", 1)[-1] for name in table.get("modules_to_save") or ()} - found.keys():
        raise UserError(f"{path}: has no tensor of {min(missing)}, which modules_to_save names; restore the file")
    return found


def _modules_in(
    tensors: Iterable[str], linears: Mapping[str, tuple[str, ...]], path: Path
) -> tuple[str, tuple[str, ...]]:
    """The beginning of the tensors' names, before `layers`, and the modules of a layer that are among them."""
    prefixes, found = set(), set()
    for name in tensors:
        match = NAME.fullmatch(name)
        if match is None or match["module"] not in linears:
            raise _unsupported(name, linears, path)
        prefixes.add(match["prefix"])
        found.add(match["module"])
    if not found:
        raise UserError(f"{path}: holds no tensor; restore the file")
    if len(prefixes) > 1:
        raise UserError(f"{path}: holds layers under {' and '.join(map(quoted, sorted(prefixes)))}; restore the file")
    return prefixes.pop(), tuple(module for module in linears if module in found)


ADAPTED = re.compile(r"\.(?:lora_|base_layer\.)")
"""In the names of an adapted module's tensors, behind the module's own name."""


def _unsupported(tensor: str, linears: Iterable[str], path: Path) -> UserError:
    """The error of a tensor of no linear, by the key of adapter_config.json where that selects its module."""
    names = [name.rsplit(".", 1)[-1] for name in linears]
    module, *rest = ADAPTED.split(tensor, maxsplit=1)
    fault = f"tensor {shortened(tensor, 120)} is not of a LoRA of {' '.join(names)}"
    if rest and (name := module.rsplit(".", 1)[-1]) not in names:
        fault = f"target_modules has {shortened(name, 40)}, whose LoRA is not supported; supported: {' '.join(names)}"
    return UserError(f"{path}: {fault}; merge the adapter with PEFT, and give the result as --model")


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


def _take(tensors: dict[str, np.ndarray], module: str, path: Path, end: str, *shape: int) -> np.ndarray:
    name = f"base_model.model.{module}.{end}"
    where = f"{path}: tensor {shortened(name, 120)}"
    if name not in tensors:
        raise UserError(f"{where} is missing, and {CONFIG_FILE} selects its module; restore the files of one adapter")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(
            f"{where} has shape {quoted(list(tensor.shape))}, {CONFIG_FILE} and the backbone say {list(shape)}; give "
            "--model the one that it was trained on"
        )
    return tensor.astype(np.float32)
