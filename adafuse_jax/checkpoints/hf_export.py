"""Export of a backbone as a Hugging Face directory: config.json, generation_config.json, safetensors shards, tokenizer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, model_directory
from adafuse_jax.checkpoints.hf_config import HFConfig, parse_hf_config, parse_tables
from adafuse_jax.checkpoints.quantised_config import BASE_IDENTITY, KEYS
from adafuse_jax.checkpoints.quantised_export import as_stored, quantization_table
from adafuse_jax.checkpoints.safetensors_files import INDEX_FILE, write_tensors
from adafuse_jax.core.atomic_files import new_directory, write_json
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table, read_json
from adafuse_jax.data.tokenizer import tokenizer_files, write_tokenizer
from adafuse_jax.models.config import ModelConfig, flat_fields
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.families.family import Family
from adafuse_jax.models.layout import ONE_DEVICE, Layout
from adafuse_jax.models.quantised import head_quantisation_of, quantisation_of, untied
from adafuse_jax.models.registry import FAMILIES

log = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000


def export_backbone(
    model: Backbone,
    out: str | Path,
    *,
    source: str | Path | HFCheckpoint | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    replace: bool = False,
    layout: Layout = ONE_DEVICE,
    base_identity: str | None = None,
) -> None:
    """Write `model` as a Hugging Face directory, in shards of at most 5 GB; quantised linears as compressed-tensors.
    generation_config.json, the tokenizer's files and what else config.json holds come from `source`; the tokenizer's are
    those of `tokenizer`, by name, if given. `base_identity`: of a quantised model, the identity of the weights it was made
    of, whose adapters it takes.

    The directory appears complete or not at all. Of several processes all call this, and the first one writes.

    Raises:
      UserError: `out` exists and is not an empty directory, unless `replace` puts the export in place of the old files, of
        which files of other names stay; a weight that is not finite; a model that config.json cannot describe.
    """
    stored = as_stored(model)
    if jax.process_index() > 0:
        for _ in _files(stored, layout):
            pass
        return
    with new_directory(Path(out), replace=replace, keep_others=True) as partial_out:
        directory, hf_config = _source_config(source)
        _write_configs(model, partial_out, directory, hf_config, base_identity)
        if directory is not None:
            write_tokenizer(tokenizer_files(directory) if tokenizer is None else tokenizer, partial_out)
        _write_weights(stored, partial_out, layout)


def _source_config(source: str | Path | HFCheckpoint | None) -> tuple[Path | None, HFConfig | None]:
    """The source's directory and, if it has a config.json, its contents; an opened checkpoint is not read again."""
    if isinstance(source, HFCheckpoint):
        return source.directory, source.hf_config
    if source is None:
        return None, None
    directory = model_directory(source)
    return directory, parse_hf_config(directory) if (directory / "config.json").exists() else None


def _write_configs(
    model: Backbone, out: Path, directory: Path | None, source: HFConfig | None, base_identity: str | None
) -> None:
    """config.json is the source's, keys that are not read included, if it describes the same function; so is
    generation_config.json, but for special tokens that are not the model's."""
    config, dtype, file = model.config, str(model.dtype), "generation_config.json"
    special = _special_tokens(config)
    if directory is not None and (directory / file).exists():
        if source is not None and _special_tokens(source.model) == special:
            shutil.copyfile(directory / file, out / file)
        else:
            others = {name: value for name, value in read_json(directory / file).items() if name not in special}
            write_json(out / file, others | {name: value for name, value in special.items() if value is not None})
    else:
        write_json(out / file, {name: value for name, value in special.items() if value is not None})
    is_untied = source is not None and source.model != config and head_quantisation_of(model) is not None
    if source is not None and config == (untied(source.model) if is_untied else source.model):
        table = dict(source.table.values) | ({"tie_word_embeddings": False} if is_untied else {})
        if table.pop("auto_map", None):
            log.info("%s: auto_map names Python code, which is not exported; left out", source.table.where)
        table |= dict.fromkeys([name for name in ("torch_dtype", "dtype") if name in table] or ["torch_dtype"], dtype)
    else:
        table = config_table(config, dtype)
        _require_described(config, table, read_json(out / file))
    table = {name: value for name, value in table.items() if name not in (*KEYS, BASE_IDENTITY)}
    if (layout := quantisation_of(model)) is not None:
        base = {} if base_identity is None else {BASE_IDENTITY: base_identity}
        table |= {"quantization_config": quantization_table(layout, head_quantisation_of(model)), **base}
    write_json(out / "config.json", table)


def _special_tokens(config: ModelConfig) -> dict[str, Any]:
    """The keys of generation_config.json that name special tokens; None: there is none."""
    eos = list(config.eos_token_ids) or None
    return {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id, "eos_token_id": eos}


def config_table(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of `config`, weights stored as `dtype`."""
    family, eos = FAMILIES[config.model_type], list(config.eos_token_ids)
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        family.key("hidden_act"): config.activation,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        family.key("rms_norm_eps"): config.norm_eps,
        **_rope_keys(config, family),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    } | family.write(config)


def _rope_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    """RoPE in the form of transformers 4 or, of families with two, `rope_parameters` by the kind of layer."""
    keys = family.rope.write(config.rope)
    if family.local_rope is None:
        return keys
    local = family.local_rope.write(config.local_rope or config.rope)
    tables = {"full_attention": keys, "sliding_attention": local}
    return {
        "rope_parameters": {
            kind: {"rope_theta": table["rope_theta"], **(table["rope_scaling"] or {"rope_type": "default"})}
            for kind, table in tables.items()
        }
    }


def _require_described(config: ModelConfig, table: dict[str, Any], generation: dict[str, Any]) -> None:
    """Raise `UserError` unless the two files, read again, are `config`: a field that its family cannot express, or that
    nothing here writes, would be lost. Special ids that are no tokens are written, and left out when they are read."""
    parsed = parse_tables(Table(table, "config.json"), Table(generation, "generation_config.json")).model
    found = {name: value for name, value, _ in flat_fields(parsed)}
    vocab = range(config.vocab_size)
    wanted = replace(
        config,
        rope=config.rope.canonical(),
        local_rope=config.local_rope and config.local_rope.canonical(),
        sliding_windows=config.sliding_windows or (None,) * config.num_layers,
        bos_token_id=config.bos_token_id if config.bos_token_id in vocab else None,
        pad_token_id=config.pad_token_id if config.pad_token_id in vocab else None,
        eos_token_ids=tuple(token for token in config.eos_token_ids if token in vocab),
    )
    for name, value, default in flat_fields(wanted):
        if found.get(name, default) != value:
            raise UserError(
                f"{name} {quoted(value)} of the model cannot be written to config.json and generation_config.json of "
                f"{config.model_type}; correct the model's config"
            )


def _write_weights(model: Backbone, out: Path, layout: Layout) -> None:
    weight_map: dict[str, str] = {}
    for file_name, arrays in _files(model, layout):
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(f"{name} is not finite in {array.dtype}; give --dtype float32, or restore the adapter")
        write_tensors(out / file_name, arrays, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file_name)
    if len({*weight_map.values()}) > 1:
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _files(model: Backbone, layout: Layout) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name and tensors of each file of weights; the host holds those of one file at a time."""
    shards: list[list[tuple[str, list[Any], int | None]]] = [[]]
    size = 0
    for name, leaves, layer, num_bytes in _tensors(model):
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, leaves, layer))
        size += num_bytes
    for i, shard in enumerate(shards):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        yield file_name, {name: _on_host(leaves, layer, layout) for name, leaves, layer in shard}


def _on_host(leaves: list[jax.Array], layer: int | None, layout: Layout) -> np.ndarray:
    parts = [layout.host(leaf if layer is None else leaf[layer]) for leaf in leaves]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _tensors(model: Backbone) -> Iterator[tuple[str, list[jax.Array], int | None, int]]:
    """(name, leaves, layer, bytes) of every tensor, which holds one leaf or several; layer None: the whole leaf."""
    family = FAMILIES[model.config.model_type]
    leaves: dict[str, dict[int, jax.Array]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        rows = family.fused_rows(path, model.config) or slice(0, None)
        leaves.setdefault(family.tensor_name(path), {})[rows.start] = variable[...]
    for name, parts in leaves.items():
        in_order = [parts[start] for start in sorted(parts)]
        num_bytes = sum(leaf.nbytes for leaf in in_order)
        if "{}" not in name:
            yield name, in_order, None, num_bytes
            continue
        num_layers = len(in_order[0])
        for layer in range(num_layers):
            yield name.format(layer), in_order, layer, num_bytes // num_layers
