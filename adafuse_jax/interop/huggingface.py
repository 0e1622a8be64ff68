"""Backbone weights from and to Hugging Face directories (config.json, single or sharded safetensors, tokenizer).

Import streams: one tensor at a time goes from the file to its place in the stacked [L, …] leaf on the device, so the host
never holds a second copy of the model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from adafuse_jax.configs import ATTENTION_LINEARS, DType, ModelConfig
from adafuse_jax.core.atomic_files import new_directory, write_json
from adafuse_jax.core.errors import UserError
from adafuse_jax.interop.hf_config import hf_config, read_json, read_model_config
from adafuse_jax.model.backbone import Backbone

SHARD_BYTES = 5_000_000_000
WEIGHT_DTYPES = ("F32", "BF16", "F16", "F64")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def model_directory(path_or_id: str | Path) -> Path:
    """`path_or_id` itself if it is a directory, else the local snapshot of that hub id (downloaded if need be)."""
    path = Path(path_or_id).expanduser()
    if os.path.isdir(path):  # unlike Path's, no error for names that no file can have
        return path
    if os.path.exists(path):
        raise UserError(f"{path}: is a file; give the model's directory or a hub id")
    if path.is_absolute() or str(path_or_id).count("/") > 1 or str(path_or_id).startswith("."):
        raise UserError(f"{path}: no such model directory; give an existing one or a hub id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "model*.safetensors", "tokenizer*", "*.jinja", "merges.txt"]
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{path_or_id}: no such directory, and the hub has no such model or cannot be reached "
            f"({type(error).__name__}); give a local directory or check the id and the network"
        ) from error


def hf_name(path: tuple[Any, ...]) -> str:
    """Hugging Face name of a leaf of `Backbone`; the name of a stacked leaf has `{}` for the layer."""
    if path[0] != "layers":
        names = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
        return names[path[0]]
    _, module, leaf = path
    if module in (*ATTENTION_LINEARS, "q_norm", "k_norm"):
        module = f"self_attn.{module}"
    elif module.endswith("_proj"):
        module = f"mlp.{module}"
    return f"model.layers.{{}}.{module}.{leaf}"


class Tensors:
    """The safetensors of a model directory: name → shape, and reading of one tensor at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if single.exists():
            files = [single.name]
        elif index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError(f"{index}: its weight_map does not name the shards; restore the file")
            files = sorted(set(weight_map.values()))
        else:
            hint = (
                "convert the .bin file to safetensors first" if list(directory.glob("*.bin")) else "check the directory"
            )
            raise UserError(f"{directory}: has no model.safetensors and no model.safetensors.index.json; {hint}")
        self._open, self.shapes, self.dtypes = {}, {}, {}
        for name in files:
            with readable(directory / name):
                file = safe_open(directory / name, framework="numpy")
                for tensor in file.keys():  # noqa: SIM118 - not a dict
                    self._open[tensor] = file
                    entry = file.get_slice(tensor)
                    self.shapes[tensor], self.dtypes[tensor] = tuple(entry.get_shape()), entry.get_dtype()

    def read(self, name: str) -> np.ndarray:
        with readable(self.directory, name):
            return self._open[name].get_tensor(name)

    def identity(self) -> str:
        """SHA-256 over every tensor's name, type, shape and up to eight evenly spaced rows: another backbone differs."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            with readable(self.directory, name):
                rows = self._open[name].get_slice(name)
                digest.update(f"{name} {rows.get_dtype()} {self.shapes[name]}".encode())
                count = self.shapes[name][0] if self.shapes[name] else 0
                for i in np.linspace(0, count - 1, num=min(8, count), dtype=int):
                    digest.update(np.ascontiguousarray(rows[int(i) : int(i) + 1]).tobytes())
        return digest.hexdigest()


@contextmanager
def readable(path: Path, tensor: str = "") -> Iterator[None]:
    """Within, a safetensors file that is missing or broken is a `UserError` that names it."""
    where = f"{path}: {tensor}" if tensor else str(path)
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{where}: the file is missing; complete the directory") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{where}: not a readable safetensors file ({error}); it may be truncated, restore it"
        ) from error


def backbone_identity(path_or_id: str | Path) -> str:
    """Identity of the weights in a model directory, to tell an adapter's backbone from any other."""
    return Tensors(model_directory(path_or_id)).identity()


def storage_dtype(directory: Path) -> DType:
    """float32 for a model stored so; bfloat16 for one stored in 16 bits (fp16 has no path of its own)."""
    table = read_json(directory / "config.json")
    stored = table.get("dtype") or table.get("torch_dtype") or "float32"
    return "float32" if stored == "float32" else "bfloat16"


def load_backbone(path_or_id: str | Path, dtype: DType | None = None) -> Backbone:
    """Import a model directory or hub id, casting every weight to `dtype` (default: `storage_dtype`).

    Raises:
      UserError: a config that is not supported; a tensor that is missing, has a wrong shape, or is no part of the model;
        a truncated file. All of it but a file's contents is checked before the first weight is read.
    """
    directory = model_directory(path_or_id)
    config = read_model_config(directory)
    tensors = Tensors(directory)
    jnp_dtype = jnp.dtype(dtype or storage_dtype(directory))
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: Backbone(config, dtype=jnp_dtype, rngs=nnx.Rngs(0))))
    leaves = nnx.to_flat_state(abstract)
    _check_tensors(tensors, {hf_name(path): leaf.shape for path, leaf in leaves}, config)
    filled = [(path, leaf.replace(_read_leaf(tensors, hf_name(path), leaf.shape, jnp_dtype))) for path, leaf in leaves]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _check_tensors(tensors: Tensors, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        stacked = "{}" in name
        expected |= {name.format(i): shape[1:] for i in range(shape[0])} if stacked else {name: shape}
    where = f"{tensors.directory}: tensor"
    for name, shape in expected.items():
        if name not in tensors.shapes:
            raise UserError(f"{where} {name} is missing; it must have shape {list(shape)}, restore the weights")
        if tensors.dtypes[name] not in WEIGHT_DTYPES:
            raise UserError(
                f"{where} {name} is of type {tensors.dtypes[name]}; give weights of type {', '.join(WEIGHT_DTYPES)}"
            )
        if tensors.shapes[name] != shape:
            found = list(tensors.shapes[name])
            raise UserError(f"{where} {name} has shape {found}, config.json says {list(shape)}; one of them is wrong")
    extra = [n for n in tensors.shapes if n not in expected and not n.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        head, embedding = tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")
        if not np.array_equal(head, embedding):
            raise UserError(
                f"{where} lm_head.weight differs from the embedding config.json ties it to; correct config.json"
            )
        extra.remove("lm_head.weight")
    if extra:
        raise UserError(
            f"{where} {extra[0]} is no part of the {config.model_type} model that config.json describes "
            f"({len(extra)} such); check config.json"
        )


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, tensor: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, tensor.astype(stack.dtype), layer, axis=0)


def _read_leaf(tensors: Tensors, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if "{}" not in name:
        return jnp.asarray(tensors.read(name)).astype(dtype)
    stack = jnp.zeros(shape, dtype)
    for layer in range(shape[0]):
        # Waiting keeps one tensor in flight; without it the host queues as many copies as it can read.
        stack = jax.block_until_ready(_set_layer(stack, layer, tensors.read(name.format(layer))))
    return stack


def export_backbone(
    model: Backbone,
    out: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Mapping[str, Path] | None = None,
    replace: bool = False,
) -> None:
    """Write `model` as a Hugging Face directory, in shards of at most 5 GB; tokenizer files are copied from `source`, or are
    those of `tokenizer`, by name.

    The directory appears complete or not at all. Raises `UserError` if `out` exists and is not an empty directory, unless
    `replace` puts it in place of what is there.
    """
    with new_directory(Path(out), replace=replace) as partial_out:
        _write_model(model, partial_out, source, tokenizer)


def _write_model(model: Backbone, out: Path, source: str | Path | None, tokenizer: Mapping[str, Path] | None) -> None:
    dtype = str(model.dtype)
    write_json(out / "config.json", hf_config(model.config, dtype))
    special = {f"{n}_token_id": getattr(model.config, f"{n}_token_id") for n in ("bos", "pad")}
    special["eos_token_id"] = list(model.config.eos_token_ids) or None
    write_json(out / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    for name in TOKENIZER_FILES if source is not None else ():
        file = model_directory(source) / name  # type: ignore[arg-type]
        if file.exists() and (tokenizer is None or name == "generation_config.json"):
            shutil.copyfile(file, out / name)
    for name, file in (tokenizer or {}).items():
        shutil.copyfile(file, out / name)

    shards: list[list[tuple[str, Any]]] = [[]]
    size = 0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        name, value = hf_name(path), leaf[...]
        parts = (
            [(name.format(i), (value, i)) for i in range(value.shape[0])] if "{}" in name else [(name, (value, None))]
        )
        for part in parts:
            part_bytes = value.nbytes // len(parts)
            if shards[-1] and size + part_bytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(part)
            size += part_bytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        arrays = {name: np.asarray(value if layer is None else value[layer]) for name, (value, layer) in shard}
        save_file(arrays, out / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file_name)
    if len(shards) > 1:
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
