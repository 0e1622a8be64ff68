"""The adapter directory: what training leaves behind and decoding takes up. Two files,

adapter_config.json          the method and its settings, and the identity of the backbone it belongs to
adapter_model.safetensors    the module's leaves by their path; of AdaFuse router.weight [E, in],
                             experts.<target>.A [L, E, R, in], experts.<target>.B [L, E, out, R]

A LoRA that PEFT wrote, in files of the same two names, is taken too.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from adafuse_jax.adapters.methods import MODULES, AnyAdapter, make_adapter
from adafuse_jax.configs import AdapterConfig, ModelConfig
from adafuse_jax.core.atomic_files import new_directory, write_json
from adafuse_jax.core.errors import UserError
from adafuse_jax.interop.hf_config import read_json
from adafuse_jax.interop.huggingface import readable
from adafuse_jax.presets import PRESETS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    adapter: AnyAdapter, out: Path, *, backbone_name: str, backbone_identity: str, replace: bool = False
) -> None:
    """Write `adapter` to the directory `out`, which appears complete or not at all. It must not exist or be empty, unless
    `replace` puts it in place of what is there. Raises as `new_directory`."""
    table = {**adapter.config.table(), "backbone": {"name": backbone_name, "identity": backbone_identity}}
    tensors = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(adapter))}
    write_adapter_files(out, table, tensors, metadata={"format": "adafuse-jax"}, replace=replace)


def write_adapter_files(
    out: Path, table: dict[str, Any], tensors: dict[str, np.ndarray], *, metadata: dict[str, str], replace: bool = False
) -> None:
    """The two files as the directory `out`. Raises as `new_directory`."""
    with new_directory(out, replace=replace) as partial:
        write_json(partial / CONFIG_FILE, table)
        save_file(tensors, partial / WEIGHTS_FILE, metadata=metadata)


def read_adapter_table(directory: Path) -> dict[str, Any]:
    """adapter_config.json as it is: of train.py, or of PEFT."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such adapter directory; give one that train.py wrote")
    if (directory / "config.json").exists() and not (directory / CONFIG_FILE).exists():
        raise UserError(f"{directory}: is a whole model, not an adapter; give it as --model, without --adapter")
    return read_json(directory / CONFIG_FILE)


def _parse(table: dict[str, Any], path: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """The `AdapterConfig` in the file `path`, and the backbone's `{"name", "identity"}` it was trained for."""
    advice = "give an adapter that train.py wrote"
    backbone, method = table.pop("backbone", None), table.get("adapter")
    if not isinstance(backbone, dict) or not all(isinstance(backbone.get(k), str) for k in ("name", "identity")):
        raise UserError(f"{path}: does not name its backbone; {advice}")
    if method not in MODULES:
        raise UserError(f"{path}: adapter is {method!r}, none of {', '.join(MODULES)}; {advice}")
    known = {"adapter", *PRESETS[method].settings}
    unknown, missing = sorted(table.keys() - known), sorted(known - table.keys())
    if unknown or missing:
        raise UserError(f"{path}: unknown keys {unknown}, missing keys {missing}; {advice}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    hints = typing.get_type_hints(AdapterConfig)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f"{path}: {name} is {table[name]!r}; {advice}")
    try:
        return AdapterConfig(**values), backbone
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def load_adapter(directory: str | Path, model: ModelConfig, *, backbone_identity: str, dtype: jnp.dtype) -> AnyAdapter:
    """The adapter in `directory`, its experts cast to `dtype` (routers stay in fp32).

    Raises:
      UserError: a missing, truncated or mismatched file, or an adapter of another backbone (PEFT does not say which
        backbone, beyond the shapes of its linears).
    """
    from adafuse_jax.interop.peft import load_peft_lora

    directory = Path(directory)
    table = read_adapter_table(directory)
    if "peft_type" in table:
        return load_peft_lora(directory, table, model, dtype=dtype)
    config, backbone = _parse(table, directory / CONFIG_FILE)
    if backbone["identity"] != backbone_identity:
        raise UserError(
            f"{directory}: was trained on another backbone ('{backbone['name']}', identity "
            f"{backbone['identity'][:12]}, this one is {backbone_identity[:12]}); give --model that one"
        )
    path = directory / WEIGHTS_FILE
    with readable(path):
        tensors = load_file(path)
    try:
        graphdef, abstract = nnx.split(jax.eval_shape(lambda: make_adapter(config, model, rngs=nnx.Rngs(0))))
    except UserError as error:
        raise UserError(f"{directory / CONFIG_FILE}: {error}") from error
    leaves = {".".join(map(str, key)): (key, leaf) for key, leaf in nnx.to_flat_state(abstract)}
    if tensors.keys() != leaves.keys():
        wrong = sorted(tensors.keys() ^ leaves.keys())[0]
        raise UserError(f"{path}: tensor {wrong} does not fit {CONFIG_FILE}; the two files are not of one adapter")
    filled = []
    for name, (key, leaf) in leaves.items():
        if tensors[name].shape != leaf.shape:
            shapes = f"{list(tensors[name].shape)}, {CONFIG_FILE} and the backbone say {list(leaf.shape)}"
            raise UserError(f"{path}: tensor {name} has shape {shapes}; the files are not of one adapter")
        filled.append((key, leaf.replace(jnp.asarray(tensors[name], jnp.float32 if "router" in key else dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
