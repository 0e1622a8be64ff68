"""Adapter directories, written by training and read by decoding. Two files,

adapter_config.json          the method and its settings, the identity of its backbone, and the SHA-256 of the weights' file
adapter_model.safetensors    the module's leaves by their path; of AdaFuse router.weight [E, in],
                             experts.<target>.A [L, E, R, in], experts.<target>.B [L, E, out, R]

A LoRA of PEFT, in files of the same two names, is read too, from the only folder with them if the directory has none.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.registry import MODULES, AnyAdapter, make_adapter
from adafuse_jax.checkpoints.adapter_files import (
    CONFIG_FILE,
    DIGEST,
    MAX_SIZE,
    WEIGHTS_FILE,
    read_adapter_table,
    write_adapter_files,
)
from adafuse_jax.checkpoints.hf_config import MAX_LAYERS
from adafuse_jax.checkpoints.peft import load_peft_lora
from adafuse_jax.checkpoints.safetensors_files import read_tensors
from adafuse_jax.core.adapter_folder import adapter_folder
from adafuse_jax.core.atomic_files import sha256
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.layout import ONE_DEVICE, Layout
from adafuse_jax.models.quantised import Quantisation

log = logging.getLogger(__name__)


def save_adapter(
    adapter: AnyAdapter,
    out: Path,
    *,
    backbone_name: str,
    backbone_identity: str,
    replace: bool = False,
    layout: Layout = ONE_DEVICE,
    quantization: Quantisation | None = None,
) -> None:
    """Write `adapter` to the directory `out`, which appears complete or not at all. It must not exist or be empty, unless
    `replace` puts it in place of what is there, whose files of other names stay. Of several processes all call this, and the
    first one writes. `quantization`: that of the backbone it was trained on. Raises as `new_directory`."""
    backbone = {"name": backbone_name, "identity": backbone_identity}
    if quantization is not None:
        backbone["quantization"] = quantization.name
    table = {**adapter.config.table(), "backbone": backbone}
    leaves = nnx.to_flat_state(nnx.state(adapter))
    tensors = {".".join(map(str, path)): layout.host(leaf[...]) for path, leaf in leaves}
    if jax.process_index() == 0:
        write_adapter_files(out, table, tensors, metadata={"format": "adafuse-jax"}, replace=replace, with_digest=True)


def trained_quantization(directory: Path) -> Quantisation | None:
    """The quantisation of the backbone that the adapter in `directory` was trained on, if it is recorded."""
    backbone = read_adapter_table(adapter_folder(directory)).get("backbone")
    name = backbone.get("quantization") if isinstance(backbone, dict) else None
    return Quantisation.of_name(name) if isinstance(name, str) else None


def _parse(table: Table) -> tuple[AdapterConfig, dict[str, Any]]:
    """The `AdapterConfig` of an adapter_config.json, and the backbone's `{"name", "identity"}` it was trained for."""
    advice = "give an adapter that train.py wrote"
    backbone, method = table.get("backbone"), table.get("adapter")
    if not isinstance(backbone, dict) or not all(isinstance(backbone.get(k), str) for k in ("name", "identity")):
        raise UserError(f"{table.where}: does not name its backbone; {advice}")
    if not isinstance(method, str) or method not in MODULES:
        raise table.error("adapter", f"none of {', '.join(MODULES)}; {advice}")
    settings = PRESETS[method].settings
    unknown = sorted(table.values.keys() - {"adapter", "backbone", DIGEST, *settings})
    missing = sorted(name for name in settings if name not in table)
    if unknown or missing:
        raise UserError(f"{table.where}: unknown keys {quoted(unknown)}, missing keys {quoted(missing)}; {advice}")
    hints = typing.get_type_hints(AdapterConfig)
    values = {name: _setting(table, name, hints[name]) for name in settings}
    try:
        return AdapterConfig(adapter=method, **values), backbone  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{table.where}: {error}") from error


def _setting(table: Table, name: str, hint: Any) -> Any:
    """A field of `AdapterConfig`, of the type `hint`. Its range is checked with the others'."""
    if typing.get_origin(hint) is tuple:
        (of, _), values = typing.get_args(hint), table.items(name)
        if not all(type(value) is of for value in values) or len(values) > MAX_LAYERS:
            raise table.error(name, f"it must be a list of {of.__name__}")
        if of is int and any(abs(value) > MAX_SIZE for value in values):
            raise table.error(name, f"it must hold integers up to {MAX_SIZE}")
        return tuple(values)
    getters: dict[Any, Callable[[str], Any]] = {
        int: partial(table.integer, low=-MAX_SIZE, high=MAX_SIZE),
        float: table.number,
        bool: table.boolean,
    }
    return getters[hint](name)


def load_adapter(
    directory: str | Path,
    model: ModelConfig,
    *,
    backbone_identity: str,
    dtype: jnp.dtype,
    quantization: Quantisation | None = None,
) -> AnyAdapter:
    """The adapter in `directory`, its experts cast to `dtype` (routers stay in fp32). It fits its backbone in any
    quantisation; a log line says if the present one, `quantization`, is not the one that it was trained on.

    Raises:
      UserError: a missing, truncated or mismatched file, or an adapter of another backbone (PEFT does not record which
        backbone, beyond the shapes of its linears).
    """
    given, directory = Path(directory).expanduser(), adapter_folder(directory)
    if directory != given:
        log.info("%s: its adapter %s is used", given, directory.name)
    table = read_adapter_table(directory)
    if "peft_type" in table:
        return load_peft_lora(directory, table, model, dtype=dtype)
    config, backbone = _parse(table)
    if backbone["identity"] != backbone_identity:
        raise UserError(
            f"{directory}: was trained on another backbone ({quoted(backbone['name'])}, identity "
            f"{backbone['identity'][:12]}, this one is {backbone_identity[:12]}); give --model that one"
        )
    trained, present = backbone.get("quantization"), None if quantization is None else quantization.name
    if trained != present:
        one, other = (quoted(name) if name else "plain weights" for name in (trained, present))
        log.info("%s: was trained on a backbone of %s, this one has %s", directory, one, other)
    path = directory / WEIGHTS_FILE
    tensors = read_tensors(path)
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    for setting, size in (("rank", config.rank), ("number of experts", config.max_experts or 1)):
        if size not in sizes:  # before arrays of that size are even described
            raise UserError(
                f"{path}: no tensor has a shape with the {setting} {size} that {CONFIG_FILE} says; the files are not of one "
                "adapter"
            )
    try:
        graphdef, abstract = nnx.split(jax.eval_shape(lambda: make_adapter(config, model, rngs=nnx.Rngs(0))))
    except UserError as error:
        raise UserError(f"{directory / CONFIG_FILE}: {error}") from error
    leaves = {".".join(map(str, key)): (key, leaf) for key, leaf in nnx.to_flat_state(abstract)}
    if tensors.keys() != leaves.keys():
        wrong = sorted(tensors.keys() ^ leaves.keys())[0]
        raise UserError(
            f"{path}: tensor {shortened(wrong, 120)} does not fit {CONFIG_FILE}; the two files are not of one adapter"
        )
    filled = []
    for name, (key, leaf) in leaves.items():
        if tensors[name].shape != leaf.shape:
            shapes = f"{list(tensors[name].shape)}, {CONFIG_FILE} and the backbone say {list(leaf.shape)}"
            raise UserError(f"{path}: tensor {name} has shape {shapes}; the files are not of one adapter")
        filled.append((key, leaf.replace(jnp.asarray(tensors[name], jnp.float32 if "router" in key else dtype))))
    written = table.text(DIGEST, None)
    if written is not None and sha256(path) != written:
        raise UserError(
            f"{path}: has other bytes than were written (by its SHA-256); restore the file, or remove {DIGEST} from "
            f"{CONFIG_FILE} if you have changed it"
        )
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
