"""The adapter directory: what training leaves behind and decoding takes up. Two files,

adapter_config.json          the `AdapterConfig`, and the identity of the backbone it belongs to
adapter_model.safetensors    router.weight [E, in]; experts.<target>.A [L, E, R, in], experts.<target>.B [L, E, out, R]
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.configs import AdapterConfig, ModelConfig
from adafuse_jax.errors import UserError
from adafuse_jax.interop.hf_config import read_json
from adafuse_jax.interop.huggingface import readable

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(adapter: AdaFuse, out: Path, *, backbone_name: str, backbone_identity: str) -> None:
    """Write `adapter` to the directory `out`, replacing an adapter that is there. At any moment a complete one
    exists under its name, or as `.old` or `.partial` beside it."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    table = {
        **dataclasses.asdict(adapter.config),
        "backbone": {"name": backbone_name, "identity": backbone_identity},
    }
    (partial / CONFIG_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    tensors = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(adapter))}
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "adafuse-jax"})
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def read_adapter_config(directory: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """The `AdapterConfig` in `directory`, and the backbone's `{"name", "identity"}` it was trained for."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such adapter directory; give one that train.py wrote")
    path = directory / CONFIG_FILE
    table = read_json(path)
    backbone = table.pop("backbone", None)
    if not isinstance(backbone, dict) or not all(isinstance(backbone.get(k), str) for k in ("name", "identity")):
        raise UserError(f"{path}: does not name its backbone; give an adapter that train.py wrote")
    known = {f.name for f in dataclasses.fields(AdapterConfig)}
    unknown, missing = sorted(table.keys() - known), sorted(known - table.keys())
    if unknown or missing:
        raise UserError(f"{path}: unknown keys {unknown}, missing keys {missing}; give an adapter that train.py wrote")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    for name, hint in typing.get_type_hints(AdapterConfig).items():
        if not _fits(values[name], hint):
            raise UserError(f"{path}: {name} is {table[name]!r}; give an adapter that train.py wrote")
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


def load_adapter(directory: str | Path, model: ModelConfig, *, backbone_identity: str, dtype: jnp.dtype) -> AdaFuse:
    """The adapter in `directory`, its experts cast to `dtype` (the router stays in fp32).

    Raises:
      UserError: a missing, truncated or mismatched file, or an adapter of another backbone.
    """
    directory = Path(directory)
    config, backbone = read_adapter_config(directory)
    if backbone["identity"] != backbone_identity:
        raise UserError(
            f"{directory}: was trained on another backbone ('{backbone['name']}', identity "
            f"{backbone['identity'][:12]}, this one is {backbone_identity[:12]}); give --model that one"
        )
    path = directory / WEIGHTS_FILE
    with readable(path):
        tensors = load_file(path)
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: AdaFuse(config, model, rngs=nnx.Rngs(0))))
    leaves = {".".join(map(str, key)): (key, leaf) for key, leaf in nnx.to_flat_state(abstract)}
    if tensors.keys() != leaves.keys():
        wrong = sorted(tensors.keys() ^ leaves.keys())[0]
        raise UserError(f"{path}: tensor {wrong} does not fit {CONFIG_FILE}; the two files are not of one adapter")
    filled = []
    for name, (key, leaf) in leaves.items():
        if tensors[name].shape != leaf.shape:
            shapes = f"{list(tensors[name].shape)}, {CONFIG_FILE} and the backbone say {list(leaf.shape)}"
            raise UserError(f"{path}: tensor {name} has shape {shapes}; the files are not of one adapter")
        filled.append((key, leaf.replace(jnp.asarray(tensors[name], jnp.float32 if key[0] == "router" else dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
