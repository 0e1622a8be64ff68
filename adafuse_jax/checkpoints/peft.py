"""Adapters of PEFT: as a LoRA, merged into a backbone, and a LoRA written as PEFT's two files.

LoRA         W' = W + s B A
DoRA         W' = diag(m / ‖W + s B A‖) (W + s B A), norms over each row        (arXiv 2402.09353)
lora_bias    b' = b + s b_B
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from adafuse_jax.adapters.lora import LoRA, merged
from adafuse_jax.checkpoints.adapter_files import read_adapter_table, write_adapter_files
from adafuse_jax.checkpoints.peft_files import (
    PeftAdapter,
    beyond_lora,
    modules_of,
    read_peft,
    require_lora,
    tensor_name,
)
from adafuse_jax.core.adapter_folder import adapter_folder
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone


def load_peft_lora(directory: Path, table: Table, model: ModelConfig, *, dtype: jnp.dtype) -> LoRA:
    """The LoRA in a PEFT directory whose adapter_config.json is `table`, its factors cast to `dtype`. Raises `UserError` as
    `read_peft`, and for an adapter that is more than a LoRA."""
    require_lora(table)
    if beyond := beyond_lora(table):  # before its tensors are read
        raise _only_merged(table.where, beyond[0], directory)
    adapter = read_peft(directory, table, model)
    if adapter.beyond:
        raise _only_merged(table.where, adapter.beyond[0], directory)
    return _lora(adapter, model, dtype)


def _only_merged(where: str, name: str, directory: Path) -> UserError:
    return UserError(
        f"{where}: {name}: changes the backbone's own weights; merge it: python -m adafuse_jax.export --model … "
        f"--adapter {directory} --output OUT, and give OUT as --model"
    )


def _lora(adapter: PeftAdapter, model: ModelConfig, dtype: jnp.dtype) -> LoRA:
    lora = jax.eval_shape(lambda: LoRA(adapter.config, model, rngs=nnx.Rngs(0)))
    for linear, expert in lora.experts.items():
        for factor, stack in adapter.factors[linear].items():
            setattr(expert, factor, getattr(expert, factor).replace(jnp.asarray(stack[:, None], dtype)))
    return lora


def read_mergeable(directory: str | Path, model: ModelConfig) -> PeftAdapter | None:
    """The adapter in a PEFT directory, whatever it changes; None if the directory is no PEFT's. Raises `UserError` as
    `read_peft`."""
    folder = adapter_folder(directory)
    table = read_adapter_table(folder)
    return read_peft(folder, table, model) if "peft_type" in table else None


def merged_peft(model: Backbone, adapter: PeftAdapter) -> Backbone:
    """The backbone with the adapter in its weights, each rounded once; the others are reused without a copy. Raises
    `UserError` for a bias of a linear that has none, and for an embedding and a head of different sizes."""
    lora = _lora(adapter, model.config, jnp.dtype("float32"))
    if adapter.magnitudes:
        model = jax.tree.map(lambda leaf: leaf, model)
        for name, expert in lora.experts.items():
            linear, magnitude = getattr(model.layers, name), jnp.asarray(adapter.magnitudes[name])
            new = _dora(linear.weight[...], expert.A[:, 0], expert.B[:, 0], magnitude, lora.config.scale)
            linear.weight = linear.weight.replace(new)
    else:
        model = merged(model, lora)
    for name, bias in adapter.biases.items():
        linear = getattr(model.layers, name)
        if linear.bias is None:
            raise UserError(
                f"{adapter.where}: lora_bias: {name} of the backbone has no bias to add it to; use PEFT itself"
            )
        linear.bias = linear.bias.replace((linear.bias[...] + bias).astype(linear.bias.dtype))
    return _with_saved(model, adapter) if adapter.saved else model


@jax.jit
def _dora(
    weight: Float[Array, "L out in"],
    a: Float[Array, "L R in"],
    b: Float[Array, "L out R"],
    magnitude: Float[Array, "L out"],
    scale: float,
) -> Float[Array, "L out in"]:
    delta = jnp.einsum("lor,lri->loi", b, a, precision=jax.lax.Precision.HIGHEST)
    direction = weight.astype(jnp.float32) + scale * delta
    stretch = magnitude / jnp.linalg.norm(direction, axis=-1)
    return jnp.where(jnp.isnan(magnitude)[..., None], weight, direction * stretch[..., None]).astype(weight.dtype)


def _with_saved(model: Backbone, adapter: PeftAdapter) -> Backbone:
    """The backbone with the embedding and head that the adapter has; they stay tied if they are equal."""
    saved = {name: jnp.asarray(value, model.dtype) for name, value in adapter.saved.items()}
    embedding = saved.get("embed_tokens", model.embed_tokens[...])
    head: Any = saved.get("lm_head")
    if head is None:
        is_same = model.lm_head is None and not adapter.keeps_tied_head
        head = embedding if is_same else model.head
    is_tied = model.lm_head is None and head.shape == embedding.shape and bool((head == embedding).all())
    if len(head) != len(embedding):
        raise UserError(
            f"{adapter.where}: embeddings of {len(embedding)} tokens and a head of {len(head)}; restore the adapter's files"
        )
    config = replace(model.config, vocab_size=len(embedding), tie_word_embeddings=is_tied)
    new = jax.eval_shape(lambda: Backbone(config, dtype=model.dtype, rngs=nnx.Rngs(0)))
    new.layers, new.norm = model.layers, model.norm
    new.embed_tokens = new.embed_tokens.replace(embedding)
    if new.lm_head is not None:
        new.lm_head = new.lm_head.replace(head)
    return new


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
