"""A backbone, its tokenizer and, if given, an adapter of it, ready to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import jax.numpy as jnp

from adafuse_jax.checkpoints.adapter_directory import load_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.models.config import DType
from adafuse_jax.models.decoder import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """`adapter` is whatever `load_adapter` makes of its directory; None is the bare backbone."""

    model: Backbone
    adapter: Any
    tokenizer: Any
    dtype: DType


def load(
    model: str | HFCheckpoint,
    adapter: str | None = None,
    dtype: DType | None = None,
    *,
    tokenizer: Any = None,
) -> Loaded:
    """Load from directories (a hub id or an opened checkpoint, for the model); float32 models multiply in float32.
    `tokenizer`: the model's and the adapter's, if it is loaded already.

    Raises `UserError` for what `HFCheckpoint.open`, `load_tokenizer`, `load_adapter` and `load_backbone` refuse, in this
    order: the large files are read last.
    """
    if dtype is not None and dtype not in get_args(DType):
        raise UserError(f"dtype is {quoted(dtype)}: choose from {', '.join(get_args(DType))}")
    checkpoint = model if isinstance(model, HFCheckpoint) else HFCheckpoint.open(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(checkpoint.directory, adapter)
    dtype = dtype or checkpoint.dtype
    if dtype == "float32":
        runtime.exact_float32()
    adapted = None
    if adapter is not None:
        identity = checkpoint.identity()
        adapted = load_adapter(
            adapter, checkpoint.config, backbone_identity=identity, dtype=jnp.dtype(dtype),
            quantization=checkpoint.quantisation,
        )  # fmt: skip
    backbone = load_backbone(checkpoint, dtype)
    return Loaded(model=backbone, adapter=adapted, tokenizer=tokenizer, dtype=dtype)
