"""Hugging Face model directories (config.json, single or sharded safetensors), opened once.

Loading streams: one tensor at a time goes from the file to its place in the stacked [L, …] leaf on its devices, so the host
never holds a second copy of the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adafuse_jax.checkpoints.hf_config import HFConfig, parse_hf_config
from adafuse_jax.checkpoints.placement import Placement, Stacked
from adafuse_jax.checkpoints.safetensors_files import DTYPES, Tensors, require_float
from adafuse_jax.checkpoints.tensor_names import stored_names
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.data.tokenizer import PATTERNS
from adafuse_jax.models.config import LINEARS, DType, ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.registry import FAMILIES
from adafuse_jax.parallel.axes import logical_axes

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HFCheckpoint:
    """A model directory, opened once and handed to all who need it: config.json and generation_config.json are parsed, and
    every tensor that the model needs is there with its shape and a type that is read; values are not checked yet.

    `dtype` is the type that the weights are loaded as unless another one is asked for.
    """

    directory: Path
    hf_config: HFConfig
    tensors: Tensors
    dtype: DType

    @classmethod
    def open(cls, path_or_id: str | Path) -> HFCheckpoint:
        """Open a directory or hub id. Keys and files that nothing uses are logged.

        The type is config.json's, else that of the first tensor; float64 becomes float32.

        Raises:
          UserError: a config that is not supported; a tensor that is missing, has a wrong shape or type, or is no part of
            the model; a broken file.
        """
        directory = model_directory(path_or_id)
        hf_config = parse_hf_config(directory)
        tensors, model = Tensors(directory), hf_config.model
        names = stored_names(
            tensors.shapes, str(directory), is_part=hf_config.is_part, is_tied=model.tie_word_embeddings
        )
        tensors.rename(names.of)
        _check_tensors(tensors, hf_config.model)
        for remark in (*hf_config.remarks, *tensors.remarks, *names.remarks):
            log.info("%s", remark)
        dtype = hf_config.dtype or DTYPES[next(name for name in tensors.dtypes.values() if name in DTYPES)]
        dtype = "float32" if dtype == "float64" else dtype
        return cls(directory=directory, hf_config=hf_config, tensors=tensors, dtype=dtype)  # type: ignore[arg-type]

    @property
    def config(self) -> ModelConfig:
        return self.hf_config.model

    def identity(self) -> str:
        """Identity of the weights, to distinguish an adapter's backbone from any other."""
        return self.tensors.identity()


def load_backbone(
    source: str | Path | HFCheckpoint,
    dtype: DType | None = None,
    *,
    place: Placement | None = None,
    into: Backbone | None = None,
) -> Backbone:
    """Stream a model directory, hub id or opened `HFCheckpoint`, tensor by tensor, to where `place` puts it (default: whole
    arrays on the default device), casting every weight to `dtype` (default: the checkpoint's). A cast that rounds, and a
    config.json that names another type than that of the tensors, are logged. `into`: the arrays of an `empty_backbone` of
    this type and place, which are consumed.

    Raises:
      UserError: as `HFCheckpoint.open`, before the first weight is read; weights that are NaN or infinite, in the file or in
        `dtype`.
    """
    checkpoint = source if isinstance(source, HFCheckpoint) else HFCheckpoint.open(source)
    config, tensors, name = checkpoint.config, checkpoint.tensors, dtype or checkpoint.dtype
    if remark := _dtype_remark(checkpoint, name):
        log.info("%s", remark)
    family, place = FAMILIES[config.model_type], place or Stacked()
    model = empty_backbone(checkpoint, name, place=place) if into is None else into
    graphdef, state = nnx.split(model)
    leaves = nnx.to_flat_state(state)
    patterns = [family.tensor_name(path) for path, _ in leaves]
    names = [
        [p.format(n) for n in range(leaf.shape[0])] if "{}" in p else [p]
        for p, (_, leaf) in zip(patterns, leaves, strict=True)
    ]

    def fill(index: int) -> tuple[Any, Any]:
        path, leaf = leaves[index]
        rows = family.fused_rows(path, config) or slice(None)
        return place.fill(leaf[...], logical_axes(path), (tensors.view(name)[rows] for name in names[index]))

    with ThreadPoolExecutor(place.num_threads) as threads:
        try:
            filled = [*threads.map(fill, range(len(leaves)))]
        except BaseException:  # Ctrl-C: the threads would read on
            tensors.stop()
            raise
    for (_, leaf), of_leaf, finite in zip(leaves, names, jax.device_get([finite for _, finite in filled]), strict=True):
        if not np.all(finite):
            raise _not_finite(tensors, of_leaf[int(np.argmin(finite))], leaf.dtype)
    arrays = [(path, leaf.replace(array)) for (path, leaf), (array, _) in zip(leaves, filled, strict=True)]
    return nnx.merge(graphdef, nnx.from_flat_state(arrays))


def empty_backbone(checkpoint: HFCheckpoint, dtype: DType, *, place: Placement | None = None) -> Backbone:
    """A backbone of zeros that `load_backbone` fills."""
    config = checkpoint.config
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: Backbone(config, dtype=dtype, rngs=nnx.Rngs(0))))
    leaves = nnx.to_flat_state(abstract)
    shapes = [(logical_axes(path), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for path, leaf in leaves]
    arrays = (place or Stacked()).empty(shapes)
    filled = [(path, leaf.replace(array)) for (path, leaf), array in zip(leaves, arrays, strict=True)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _dtype_remark(checkpoint: HFCheckpoint, dtype: str) -> str | None:
    types = checkpoint.tensors.dtypes
    stored = sorted({DTYPES[types[name]] for name, _ in tensor_shapes(checkpoint.config)})
    rounded = [name for name in stored if name != dtype and (dtype != "float32" or name == "float64")]
    if rounded:
        return f"{checkpoint.directory}: weights stored as {' and '.join(rounded)} are rounded to {dtype}"
    if checkpoint.hf_config.dtype not in (None, *stored):
        return (
            f"{checkpoint.directory}: config.json says {checkpoint.hf_config.dtype}, the weights are stored as "
            f"{' and '.join(stored)}; loaded as {dtype}"
        )
    return None


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face names and shapes of all tensors of a model, one after the other."""
    embed, tensor_name = config.embed_dim, FAMILIES[config.model_type].tensor_name
    yield tensor_name(("embed_tokens",)), (config.vocab_size, embed)
    yield tensor_name(("norm", "weight")), (embed,)
    if not config.tie_word_embeddings:
        yield tensor_name(("lm_head",)), (config.vocab_size, embed)
    of_layer = {tensor_name(("layers", name, "weight")): shape for name, shape in config.norm_shapes().items()}
    for name in LINEARS:
        out, into = config.linear_shape(name)
        for leaf, rest in (("weight", (into,)), ("bias", ())):
            if leaf == "weight" or config.has_bias(name):
                pattern = tensor_name(("layers", name, leaf))
                rows = of_layer[pattern][0] if pattern in of_layer else 0  # of linears in the same tensor
                of_layer[pattern] = (rows + out, *rest)
    for layer in range(config.num_layers):
        for pattern, shape in of_layer.items():
            yield pattern.format(layer), shape


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


def _not_finite(tensors: Tensors, name: str, dtype: np.dtype) -> UserError:
    where = f"{tensors.directory}: tensor {name}"
    if np.isfinite(tensors.read(name)).all():
        return UserError(f"{where} holds values beyond the range of {dtype}; give --dtype float32")
    return UserError(f"{where} holds NaN or infinite values; restore the weights")
