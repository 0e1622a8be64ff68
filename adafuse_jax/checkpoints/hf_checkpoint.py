"""Backbone weights from and to Hugging Face directories (config.json, single or sharded safetensors, tokenizer).

Import streams: one tensor at a time goes from the file to its place in the stacked [L, …] leaf on the device, so the host
never holds a second copy of the model.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafuse_jax.checkpoints.hf_config import hf_config, parse_hf_config
from adafuse_jax.checkpoints.safetensors_files import DTYPES, Tensors, require_float, write_tensors
from adafuse_jax.core.atomic_files import new_directory, write_json
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import read_json
from adafuse_jax.data.tokenizer import PATTERNS, tokenizer_files, write_tokenizer
from adafuse_jax.models.config import ATTENTION_LINEARS, LINEARS, DType, ModelConfig
from adafuse_jax.models.decoder import Backbone

log = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000


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
        patterns = ["*.json", "model*.safetensors", "*.jinja", *PATTERNS]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model directory, checked but for the values of its weights: config.json and generation_config.json are parsed, and
    every tensor that the model needs is there with its shape and a type that is read.

    `dtype` is the type that the weights are loaded as unless another one is asked for, `named_dtype` config.json's.
    """

    directory: Path
    config: ModelConfig
    tensors: Tensors
    dtype: DType
    named_dtype: str | None

    @classmethod
    def open(cls, path_or_id: str | Path) -> Checkpoint:
        """Of a directory or hub id. What its files hold in vain is logged.

        The type is config.json's, else that of the first tensor; float64 becomes float32.

        Raises:
          UserError: a config that is not supported; a tensor that is missing, has a wrong shape or type, or is no part of
            the model; a broken file.
        """
        directory = model_directory(path_or_id)
        parsed = parse_hf_config(directory)
        tensors = Tensors(directory)
        _check_tensors(tensors, parsed.model)
        for remark in (*parsed.remarks, *tensors.remarks):
            log.info("%s", remark)
        dtype = parsed.dtype or DTYPES[next(name for name in tensors.dtypes.values() if name in DTYPES)]
        dtype = "float32" if dtype == "float64" else dtype
        return cls(directory=directory, config=parsed.model, tensors=tensors, dtype=dtype, named_dtype=parsed.dtype)  # type: ignore[arg-type]

    def identity(self) -> str:
        """Identity of the weights, to tell an adapter's backbone from any other."""
        return self.tensors.identity()


def backbone_identity(path_or_id: str | Path) -> str:
    """Identity of the weights in a model directory, to tell an adapter's backbone from any other."""
    return Checkpoint.open(path_or_id).identity()


def load_backbone(source: str | Path | Checkpoint, dtype: DType | None = None) -> Backbone:
    """Import a model directory, hub id or opened `Checkpoint`, casting every weight to `dtype` (default: the checkpoint's).
    A cast that rounds, and a config.json that names another type than that of the tensors, are logged.

    Raises:
      UserError: as `Checkpoint.open`, before the first weight is read; weights that are NaN or infinite, in the file or in
        `dtype`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    config, name = checkpoint.config, dtype or checkpoint.dtype
    if remark := _dtype_remark(checkpoint, name):
        log.info("%s", remark)
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: Backbone(config, dtype=name, rngs=nnx.Rngs(0))))
    filled = [
        (path, leaf.replace(_read_leaf(checkpoint.tensors, hf_name(path), leaf.shape, jnp.dtype(name))))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _dtype_remark(checkpoint: Checkpoint, dtype: str) -> str | None:
    types = checkpoint.tensors.dtypes
    stored = sorted({DTYPES[types[name]] for name, _ in tensor_shapes(checkpoint.config)})
    rounded = [name for name in stored if name != dtype and (dtype != "float32" or name == "float64")]
    if rounded:
        return f"{checkpoint.directory}: weights stored as {' and '.join(rounded)} are rounded to {dtype}"
    if checkpoint.named_dtype not in (None, *stored):
        return (
            f"{checkpoint.directory}: config.json says {checkpoint.named_dtype}, the weights are stored as "
            f"{' and '.join(stored)}; loaded as {dtype}"
        )
    return None


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face names and shapes of all tensors of a model, one after the other."""
    embed, heads = config.embed_dim, {"q_norm": config.head_dim, "k_norm": config.head_dim}
    norms = {"input_layernorm": embed, "post_attention_layernorm": embed} | (heads if config.qk_norm else {})
    yield hf_name(("embed_tokens",)), (config.vocab_size, embed)
    yield hf_name(("norm", "weight")), (embed,)
    if not config.tie_word_embeddings:
        yield hf_name(("lm_head",)), (config.vocab_size, embed)
    for layer in range(config.num_layers):
        for name, size in norms.items():
            yield hf_name(("layers", name, "weight")).format(layer), (size,)
        for name in LINEARS:
            shape = config.linear_shape(name)
            yield hf_name(("layers", name, "weight")).format(layer), shape
            if config.has_bias(name):
                yield hf_name(("layers", name, "bias")).format(layer), shape[:1]


def _check_tensors(tensors: Tensors, config: ModelConfig) -> None:
    expected = set()
    where = f"{tensors.directory}: tensor"
    for name, shape in tensor_shapes(config):  # ends at the first that is missing, however many config.json asks for
        if name not in tensors.shapes:
            raise UserError(
                f"{where} {name} is missing; of the {config.num_layers} layers in config.json it must have shape "
                f"{list(shape)}, restore the weights"
            )
        require_float(tensors.dtypes[name], f"{where} {name}")
        if tensors.shapes[name] != shape:
            found = quoted(list(tensors.shapes[name]))
            raise UserError(f"{where} {name} has shape {found}, config.json says {list(shape)}; one of them is wrong")
        expected.add(name)
    extra = [n for n in tensors.shapes if n not in expected and not n.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        require_float(tensors.dtypes["lm_head.weight"], f"{where} lm_head.weight")
        head, embedding = tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")
        if not np.array_equal(head, embedding):
            raise UserError(
                f"{where} lm_head.weight differs from the embedding config.json ties it to; correct config.json"
            )
        extra.remove("lm_head.weight")
    if extra:
        raise UserError(
            f"{where} {shortened(extra[0], 120)} is no part of the {config.model_type} model that config.json describes "
            f"({len(extra)} such); check config.json"
        )


@partial(jax.jit, donate_argnums=(0, 1))
def _set_layer(stack: jax.Array, finite: jax.Array, layer: jax.Array, tensor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`tensor` at `layer` of `stack`, and in `finite` whether all of it is."""
    cast = tensor.astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, cast, layer, axis=0)
    return stack, finite.at[layer].set(jnp.isfinite(cast).all())


def _read_leaf(tensors: Tensors, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if "{}" not in name:
        leaf = jnp.asarray(tensors.read(name)).astype(dtype)
        finite = jnp.isfinite(leaf).all()[None]
    else:
        leaf, finite = jnp.zeros(shape, dtype), jnp.ones(shape[0], bool)
        for layer in range(shape[0]):
            # Waiting keeps one tensor in flight; without it the host queues as many copies as it can read.
            leaf, finite = jax.block_until_ready(_set_layer(leaf, finite, layer, tensors.read(name.format(layer))))
    if not np.all(finite):
        raise _not_finite(tensors, name.format(int(np.argmin(finite))), dtype)
    return leaf


def _not_finite(tensors: Tensors, name: str, dtype: jnp.dtype) -> UserError:
    where = f"{tensors.directory}: tensor {name}"
    if np.isfinite(tensors.read(name)).all():
        return UserError(f"{where} holds values beyond the range of {dtype}; give --dtype float32")
    return UserError(f"{where} holds NaN or infinite values; restore the weights")


def export_backbone(
    model: Backbone,
    out: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> None:
    """Write `model` as a Hugging Face directory, in shards of at most 5 GB. generation_config.json, the tokenizer's
    files and what else config.json holds come from `source`; the tokenizer's are those of `tokenizer`, by name, if given.

    The directory appears complete or not at all. Raises `UserError` if `out` exists and is not an empty directory, unless
    `replace` puts it in place of what is there, whose files of other names stay.
    """
    with new_directory(Path(out), replace=replace, keep_others=True) as partial_out:
        _write_model(model, partial_out, source, tokenizer)


def _write_model(model: Backbone, out: Path, source: str | Path | None, tokenizer: Mapping[str, bytes] | None) -> None:
    directory = None if source is None else model_directory(source)
    write_json(out / "config.json", _config_table(model, directory))
    special = {f"{n}_token_id": getattr(model.config, f"{n}_token_id") for n in ("bos", "pad")}
    special["eos_token_id"] = list(model.config.eos_token_ids) or None
    write_json(out / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    if directory is not None:
        write_tokenizer(tokenizer_files(directory) if tokenizer is None else tokenizer, out)
        if (directory / "generation_config.json").exists():
            shutil.copyfile(directory / "generation_config.json", out / "generation_config.json")

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
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(f"{name} is not finite in {array.dtype}; give --dtype float32, or restore the adapter")
        write_tensors(out / file_name, arrays, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file_name)
    if len(shards) > 1:
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _config_table(model: Backbone, source: Path | None) -> dict[str, Any]:
    """The config.json of a model: its source's, keys that are not read included, if it describes the same function."""
    dtype = str(model.dtype)
    if source is None or not (source / "config.json").exists() or parse_hf_config(source).model != model.config:
        return hf_config(model.config, dtype)
    table = read_json(source / "config.json")
    if table.pop("auto_map", None):
        log.info("%s: auto_map names Python code, which is not exported; left out", source / "config.json")
    names = [name for name in ("torch_dtype", "dtype") if name in table] or ["torch_dtype"]
    return table | dict.fromkeys(names, dtype)
