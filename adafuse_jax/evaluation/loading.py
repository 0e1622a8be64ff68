"""A backbone, its tokenizer and, if given, an adapter of it, ready to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from adafuse_jax.adapters.directory import load_adapter
from adafuse_jax.configs import DType
from adafuse_jax.core import runtime
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.interop.hf_config import read_model_config
from adafuse_jax.interop.huggingface import backbone_identity, load_backbone, model_directory, storage_dtype
from adafuse_jax.model.backbone import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """`adapter` is whatever `load_adapter` makes of its directory; None is the bare backbone."""

    model: Backbone
    adapter: Any
    tokenizer: Any
    dtype: DType


def load(model: str, adapter: str | None = None, dtype: DType | None = None) -> Loaded:
    """Load from directories (or a hub id, for the model); float32 models multiply in float32.

    Raises `UserError` for what `load_tokenizer`, `load_adapter` and `load_backbone` refuse, the large files last.
    """
    directory = model_directory(model)
    model_config = read_model_config(directory)
    tokenizer = load_tokenizer(directory, adapter)
    dtype = dtype or storage_dtype(directory)
    if dtype == "float32":
        runtime.exact_float32()
    adapted = None
    if adapter is not None:
        identity = backbone_identity(directory)
        adapted = load_adapter(adapter, model_config, backbone_identity=identity, dtype=jnp.dtype(dtype))
    return Loaded(model=load_backbone(directory, dtype), adapter=adapted, tokenizer=tokenizer, dtype=dtype)
