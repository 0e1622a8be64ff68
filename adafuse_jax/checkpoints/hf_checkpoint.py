"""Hugging Face model directories (config.json, single or sharded safetensors), opened once.

Loading streams: one tensor at a time goes from the file to its place in the stacked [L, …] leaf on its devices, so the host
never holds a second copy of the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafuse_jax.checkpoints.hf_config import HFConfig, parse_hf_config
from adafuse_jax.checkpoints.placement import Placement, Stacked
from adafuse_jax.checkpoints.safetensors_files import DTYPES, Tensors, require_float
from adafuse_jax.checkpoints.tensor_names import HEAD, stored_names
from adafuse_jax.checkpoints.weight_forms import FLOAT, Dense, WeightForm
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.data.tokenizer import PATTERNS
from adafuse_jax.models.config import LINEARS, DType, ModelConfig, Quantize
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import (
    HEAD_LAYOUT,
    LAYOUTS,
    Quantisation,
    quantised,
    require_layout,
    uneven_groups,
    with_quantised_head,
)
from adafuse_jax.models.registry import FAMILIES
from adafuse_jax.parallel.axes import logical_axes
from pallas_kernels.quantised import QuantArray

log = logging.getLogger(__name__)

ALL_FILES = ("*.json", "model*.safetensors", "*.jinja", *PATTERNS)
"""Patterns of a model's files: its config, weights and tokenizer."""


def model_directory(path_or_id: str | Path, patterns: Sequence[str] = ALL_FILES, revision: str | None = None) -> Path:
    """`path_or_id` itself if it is a directory, else the local snapshot of that hub id, of `revision` or the newest, with
    the files of these patterns (downloaded if need be)."""
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
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=[*patterns]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{path_or_id}: no such directory, and the hub has no such model or cannot be reached "
            f"({type(error).__name__}); give a local directory or check the id and the network"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class HFCheckpoint:
    """A model directory, opened once and handed to all who need it: config.json and generation_config.json are parsed, and
    every tensor that the model needs is there with its shape and a type that is read; values are not checked yet.

    `dtype` is the type that the weights are loaded as unless another one is asked for, `quantisation` their form in the
    model, that of the files unless `quantised` has changed it; None: plain.
    """

    directory: Path
    hf_config: HFConfig
    tensors: Tensors
    dtype: DType
    quantisation: Quantisation | None

    @classmethod
    def open(
        cls, path_or_id: str | Path, quantize: Quantize | None = None, quantize_head: bool = False
    ) -> HFCheckpoint:
        """Open a directory or hub id, whose linears and head are quantised as by `quantised`. Keys and files that nothing
        uses are logged. Of a hub id no weights are downloaded before the config is known to be supported.

        The type is config.json's, else that of the first tensor; float64 becomes float32.

        Raises:
          UserError: a config that is not supported; as `quantised`; a tensor that is missing, has a wrong shape or type, or
            is no part of the model; a broken file.
        """
        directory = model_directory(path_or_id, ["*.json"])
        hf_config = parse_hf_config(directory)
        quantisation = _quantisation(hf_config, directory, quantize, quantize_head)
        directory = model_directory(
            path_or_id, revision=directory.name
        )  # of a hub id, the snapshot that the config is from
        tensors, model = Tensors(directory), hf_config.model
        names = stored_names(
            tensors.shapes, str(directory), is_part=hf_config.is_part, is_tied=model.tie_word_embeddings
        )
        tensors.rename(names.of)
        _check_tensors(tensors, hf_config)
        for remark in (*hf_config.remarks, *tensors.remarks, *names.remarks):
            log.info("%s", remark)
        dtype = hf_config.dtype or DTYPES[next(name for name in tensors.dtypes.values() if name in DTYPES)]
        dtype = "float32" if dtype == "float64" else dtype
        return cls(
            directory=directory, hf_config=hf_config, tensors=tensors, dtype=dtype, quantisation=quantisation  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def config(self) -> ModelConfig:
        return self.hf_config.model

    def quantised(self, quantize: Quantize | None, quantize_head: bool = False) -> HFCheckpoint:
        """This checkpoint, whose linears are quantised as they are loaded if `quantize` is given. With `quantize_head` so is
        the head, beside them or beside linears that the files have quantised; it is then tied no more.

        Raises:
          UserError: `quantize` does not fit the shapes, the weights are quantised in another way, or the head is to be
            quantised and the linears are not.
        """
        return replace(self, quantisation=_quantisation(self.hf_config, self.directory, quantize, quantize_head))

    def forms(self, dtype: DType) -> tuple[WeightForm | None, WeightForm | None]:
        """The forms in which the weights of the linears and of the head are read for a model of `dtype`; None for plain ones
        that stay so."""
        linears, head, found = self.hf_config.form, self.hf_config.head_form, self.quantisation
        if found is not None and linears is None:
            linears = Dense(found.linears, found.linears.scale_dtype(dtype))
        if found is not None and found.has_head and head is None:
            head = Dense(HEAD_LAYOUT, HEAD_LAYOUT.scale_dtype(dtype))
        return linears, head

    def identity(self) -> str:
        """Identity of the weights, to distinguish an adapter's backbone from any other; of an export that is quantised, that
        of the weights it was made of."""
        return self.hf_config.base_identity or self.tensors.identity()


def _quantisation(
    hf_config: HFConfig, directory: Path, quantize: Quantize | None, quantize_head: bool
) -> Quantisation | None:
    """The form of the weights in the model: that of the files in `directory`, or what is asked for. Raises `UserError` as
    `HFCheckpoint.quantised`."""
    if quantize is not None and quantize not in [*LAYOUTS]:  # a list, which the harness may give, has no hash
        raise UserError(f"quantize is {quoted(quantize)}: choose from {', '.join(LAYOUTS)}")
    if not isinstance(quantize_head, bool):
        raise UserError(f"quantize_head is {quoted(quantize_head)}: choose from True, False")
    stored = None if hf_config.form is None else hf_config.form.layout
    has_head, asked = hf_config.head_form is not None, None if quantize is None else LAYOUTS[quantize]
    if stored is not None and asked not in (None, stored):
        raise UserError(
            f"--quantize {quantize}: the weights in {directory} are {stored.name} already; leave it out, or give the "
            "unquantised model"
        )
    layout = asked or stored
    if layout is None:
        if quantize_head:
            raise UserError("--quantize-head: the linears have plain weights; give --quantize with it")
        return None
    require_layout(hf_config.model, layout)
    return Quantisation(layout, quantize_head or has_head)


def load_backbone(
    source: str | Path | HFCheckpoint,
    dtype: DType | None = None,
    *,
    place: Placement | None = None,
    into: Backbone | None = None,
) -> Backbone:
    """Stream a model directory, hub id or opened `HFCheckpoint`, tensor by tensor, to where `place` puts it (default: whole
    arrays on the default device), casting every weight to `dtype` (default: the checkpoint's), or quantising it as the
    checkpoint says. A cast that rounds, and a config.json that names another type than that of the tensors, are logged.
    `into`: the arrays of an `empty_backbone` of this type and place, which are consumed.

    Raises:
      UserError: as `HFCheckpoint.open`, before the first weight is read; weights that are NaN or infinite, in the file or in
        `dtype`.
    """
    checkpoint = source if isinstance(source, HFCheckpoint) else HFCheckpoint.open(source)
    config, tensors, dtype = checkpoint.config, checkpoint.tensors, dtype or checkpoint.dtype
    if remark := _dtype_remark(checkpoint, dtype):
        log.info("%s", remark)
    family, place = FAMILIES[config.model_type], place or Stacked()
    form, head_form = forms = checkpoint.forms(dtype)
    for what, of_part in zip(("the linears' weights", "the head's weights"), forms, strict=True):
        if of_part is not None:
            done = "are quantised to" if isinstance(of_part, Dense) else "are"
            log.info("%s: %s %s %s", checkpoint.directory, what, done, of_part.layout.name)
    if into is None:
        into = empty_backbone(checkpoint, dtype, place=place)
    model, untied_head = into, config.tie_word_embeddings and head_form is not None
    graphdef, state = nnx.split(model)
    leaves = nnx.to_flat_state(state)
    patterns = [
        family.tensor_name(("embed_tokens",) if untied_head and path == ("lm_head",) else path) for path, _ in leaves
    ]
    names = [
        [p.format(n) for n in range(leaf.shape[0])] if "{}" in p else [p]
        for p, (_, leaf) in zip(patterns, leaves, strict=True)
    ]

    def form_of(path: tuple[Any, ...], leaf: Any) -> WeightForm | None:
        """The form of a quantised weight's tensors."""
        if not isinstance(leaf[...], QuantArray):
            return None
        return head_form if path[0] == "lm_head" else form

    def fill(index: int) -> tuple[Any, Any]:
        path, leaf = leaves[index]
        rows, of_leaf = family.fused_rows(path, config) or slice(None), form_of(path, leaf)
        if of_leaf is not None:
            parts = ([tensors.view(part_name(name, part)) for part in of_leaf.parts] for name in names[index])
            of_layers = (of_leaf.of_rows(of_layer, rows) for of_layer in parts)
            return place.fill_quantised(leaf[...], logical_axes(path), of_layers, of_leaf, dtype)
        return place.fill(leaf[...], logical_axes(path), (tensors.view(name)[rows] for name in names[index]))

    with ThreadPoolExecutor(place.num_threads) as threads:
        try:
            filled = [*threads.map(fill, range(len(leaves)))]
        except BaseException:  # Ctrl-C: the threads would read on
            tensors.stop()
            raise
    all_finite = jax.device_get([finite for _, finite in filled])
    for (path, leaf), of_leaf, finite in zip(leaves, names, all_finite, strict=True):
        if not np.all(finite):
            name = of_leaf[int(np.argmin(finite))]
            if (of_part := form_of(path, leaf)) is not None:  # by its scales
                name = part_name(name, of_part.parts[-1])
            raise _not_finite(tensors, name, jnp.dtype(dtype))
    arrays = [(path, leaf.replace(array)) for (path, leaf), (array, _) in zip(leaves, filled, strict=True)]
    return nnx.merge(graphdef, nnx.from_flat_state(arrays))


def part_name(name: str, part: str) -> str:
    """The tensor that a form has in the place of a linear's weight, or beside it."""
    return name.removesuffix("weight") + part


def empty_backbone(checkpoint: HFCheckpoint, dtype: DType, *, place: Placement | None = None) -> Backbone:
    """A backbone of zeros that `load_backbone` fills."""
    form, head_form = checkpoint.forms(dtype)

    def make() -> Backbone:
        model = Backbone(checkpoint.config, dtype=dtype, rngs=nnx.Rngs(0))
        if form is not None:
            names = [name for name, _ in _weights(checkpoint.config)]
            model = quantised(model, form.layout, _scale_dtype(checkpoint, form, names))
        if head_form is not None:
            model = with_quantised_head(model, _scale_dtype(checkpoint, head_form, [HEAD]))
        return model

    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(make))
    arrays = (place or Stacked()).empty([(logical_axes(path), leaf) for path, leaf in leaves])
    return jax.tree.unflatten(structure, arrays)


def _scale_dtype(checkpoint: HFCheckpoint, form: WeightForm, names: Iterable[str]) -> jnp.dtype:
    """Type of the scales of weights: of files the one that holds all of theirs exactly; float64 becomes float32."""
    if isinstance(form, Dense):
        return form.scale_dtype
    types = checkpoint.tensors.dtypes
    stored = {DTYPES[types[part_name(name, form.parts[1])]] for name in names}
    return jax.dtypes.canonicalize_dtype(jnp.result_type(*sorted(stored)))


def _dtype_remark(checkpoint: HFCheckpoint, dtype: str) -> str | None:
    types = checkpoint.tensors.dtypes
    stored = sorted({DTYPES[types[name]] for name, _ in tensor_shapes(checkpoint.config) if name in types})
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


def _weights(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Hugging Face's name of each linear's weight, and the linear's."""
    tensor_name = FAMILIES[config.model_type].tensor_name
    for layer in range(config.num_layers):
        for linear in LINEARS:
            yield tensor_name(("layers", linear, "weight")).format(layer), linear


def _check_tensors(tensors: Tensors, hf_config: HFConfig) -> None:
    expected, config, form = set(), hf_config.model, hf_config.form
    where = f"{tensors.directory}: tensor"
    linears = {} if form is None else dict(_weights(config))
    biases = {part_name(name, "bias") for name in linears}
    packed = next((name for name in tensors.shapes if name.endswith((".qweight", ".weight_packed"))), None)
    if form is None and packed is not None:
        raise UserError(
            f"{where} {shortened(packed, 120)} is quantised, and config.json has no quantization_config; restore the "
            "file, or give the unquantised model"
        )
    if form is not None and (reason := uneven_groups(config, form.layout)):
        raise UserError(f"{tensors.directory}: config.json: {reason}; restore the file")
    for name, shape in tensor_shapes(config):  # ends at the first that is missing, however many config.json asks for
        of_part = hf_config.head_form if name == HEAD else form if name in linears else None
        if of_part is not None:
            expected |= _check_quantised(tensors, name, shape, of_part, config)
            continue
        _check_tensor(tensors, name, shape, FLOAT, config.num_layers)
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
    zeros = [name for name in extra if name in biases and not tensors.read(name).any()]
    if zeros:  # GPTQ's programs write one for every linear
        log.info("%s %s is a bias of 0, and not used (%d such)", where, zeros[0], len(zeros))
        extra = [name for name in extra if name not in zeros]
    if extra:
        raise UserError(
            f"{where} {shortened(extra[0], 120)} is no part of the {config.model_type} model that config.json describes "
            f"({len(extra)} such); check config.json"
        )


def _check_tensor(tensors: Tensors, name: str, shape: tuple[int, ...], dtype: str, num_layers: int) -> None:
    where = f"{tensors.directory}: tensor"
    if name not in tensors.shapes:
        raise UserError(
            f"{where} {name} is missing; of the {num_layers} layers in config.json it must have shape {list(shape)}, "
            "restore the weights"
        )
    if dtype == FLOAT:
        require_float(tensors.dtypes[name], f"{where} {name}")
    elif tensors.dtypes[name] != dtype:
        found = shortened(tensors.dtypes[name], 40)
        raise UserError(f"{where} {name} is of type {found}, config.json says {dtype}; one of them is wrong")
    if tensors.shapes[name] != shape:
        found = quoted(list(tensors.shapes[name]))
        raise UserError(f"{where} {name} has shape {found}, config.json says {list(shape)}; one of them is wrong")


def _check_quantised(
    tensors: Tensors, name: str, shape: tuple[int, ...], form: WeightForm, config: ModelConfig
) -> set[str]:
    """Names of the tensors of a quantised weight."""
    expected = form.tensors(*shape)
    for part, (part_shape, dtype) in expected.items():
        _check_tensor(tensors, part_name(name, part), part_shape, dtype, config.num_layers)
    ends = {part for part in ("g_idx", "weight_g_idx", "weight_zero_point") if part_name(name, part) in tensors.shapes}
    where = f"{tensors.directory}: tensor {part_name(name, '')}".removesuffix(".")
    form.check(lambda part: tensors.read(part_name(name, part)), where, ends, shape)
    return {part_name(name, part) for part in expected | dict.fromkeys(ends)}


def _not_finite(tensors: Tensors, name: str, dtype: np.dtype) -> UserError:
    where = f"{tensors.directory}: tensor {name}"
    if np.isfinite(tensors.read(name)).all():
        return UserError(f"{where} holds values beyond the range of {dtype}; give --dtype float32")
    return UserError(f"{where} holds NaN or infinite values; restore the weights")
