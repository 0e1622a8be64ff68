"""Backbones whose linears are quantised. Embeddings, head, norms and biases stay as they are."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import LINEARS, ModelConfig, Quantize
from adafuse_jax.models.decoder import Backbone
from pallas_kernels.quantised import INT4, INT4_G64, INT8, QuantArray, QuantLayout, quantise

LAYOUTS: dict[Quantize, QuantLayout] = {"int8": INT8, "int4": INT4, "int4-g64": INT4_G64}
"""`--quantize` → layout: a scale for each output channel, or for each group of 128 or 64 inputs."""


def quantised(model: Backbone, layout: QuantLayout, scale_dtype: DTypeLike | None = None) -> Backbone:
    """The backbone with its linears' weights quantised, all other arrays reused; the scales are of `scale_dtype` (default:
    the layout's choice). Raises `UserError` as `require_layout`."""
    require_layout(model.config, layout)
    model = jax.tree.map(lambda leaf: leaf, model)
    for name in LINEARS:
        linear = getattr(model.layers, name)
        weight = linear.weight[...]
        linear.weight = nnx.Param(quantise(weight, layout, scale_dtype or layout.scale_dtype(weight.dtype)))
    return model


def quantisation_of(model: Backbone) -> QuantLayout | None:
    """The layout of the backbone's linears; None if they are not quantised."""
    weight = getattr(model.layers, LINEARS[0]).weight[...]
    return weight.layout if isinstance(weight, QuantArray) else None


def uneven_groups(config: ModelConfig, layout: QuantLayout) -> str | None:
    """The reason why the inputs of a linear are not whole groups; None if all are."""
    for name in LINEARS:
        in_dim = config.linear_shape(name)[1]
        if layout.group_size and in_dim % layout.group_size:
            return f"{name} has {in_dim} inputs, no multiple of {layout.group_size}"
    return None


def require_layout(config: ModelConfig, layout: QuantLayout) -> None:
    """Raise `UserError` if a linear's inputs are not whole groups."""
    if reason := uneven_groups(config, layout):
        fitting = [name for name, other in LAYOUTS.items() if uneven_groups(config, other) is None]
        raise UserError(f"--quantize {layout.name}: {reason}; give --quantize {' or '.join(fitting)}")
