"""Backbones whose linears are quantised, and on request the head. Embeddings, norms and biases stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from flax import nnx
from jax.typing import DTypeLike

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import LINEARS, ModelConfig, Quantize
from adafuse_jax.models.decoder import Backbone
from pallas_kernels.quantised import INT4, INT4_G64, INT8, QuantArray, QuantLayout, quantise

LAYOUTS: dict[Quantize, QuantLayout] = {"int8": INT8, "int4": INT4, "int4-g64": INT4_G64}
"""`--quantize` → layout: a scale for each output channel, or for each group of 128 or 64 inputs."""
HEAD_LAYOUT = INT8
"""Layout of a quantised head."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Layout of a backbone's linears, and whether the head has `HEAD_LAYOUT`."""

    linears: QuantLayout
    has_head: bool = False

    @property
    def name(self) -> str:
        """Name in the files of adapters and runs: `int4`, or `int4 and head int8`."""
        return self.linears.name + (f" and head {HEAD_LAYOUT.name}" if self.has_head else "")

    @classmethod
    def of_name(cls, name: str) -> Quantisation | None:
        """The one with a `name`; None for other texts."""
        linears, separator, head = name.partition(" and head ")
        layout = QuantLayout.of_name(linears)
        return None if layout is None or (head != separator and head != HEAD_LAYOUT.name) else cls(layout, bool(head))


def linears_of(quantisation: Quantisation | None) -> QuantLayout | None:
    """The layout of the linears; None for plain weights."""
    return None if quantisation is None else quantisation.linears


def quantised(
    model: Backbone, layout: QuantLayout, scale_dtype: DTypeLike | None = None, *, head: bool = False
) -> Backbone:
    """The backbone with its linears' weights quantised, and with `head` the head; all other arrays are reused. The scales
    are of `scale_dtype` (default: the layout's choice). Raises `UserError` as `require_layout`."""
    require_layout(model.config, layout)
    model = jax.tree.map(lambda leaf: leaf, model)
    for name in LINEARS:
        linear = getattr(model.layers, name)
        weight = linear.weight[...]
        linear.weight = nnx.Param(quantise(weight, layout, scale_dtype or layout.scale_dtype(weight.dtype)))
    return with_quantised_head(model, scale_dtype) if head else model


def with_quantised_head(model: Backbone, scale_dtype: DTypeLike | None = None) -> Backbone:
    """The backbone with the head quantised. One that was tied is untied: the embedding stays as it is."""
    head, config = (model.embed_tokens if model.lm_head is None else model.lm_head)[...], untied(model.config)
    new = jax.eval_shape(lambda: Backbone(config, dtype=model.dtype, rngs=nnx.Rngs(0)))
    new.layers = jax.tree.map(lambda leaf: leaf, model.layers)
    new.layers.config, new.norm, new.embed_tokens = config, model.norm, model.embed_tokens
    new.lm_head = nnx.Param(quantise(head, HEAD_LAYOUT, scale_dtype or HEAD_LAYOUT.scale_dtype(model.dtype)))
    return new


def untied(config: ModelConfig) -> ModelConfig:
    """The config with a head of its own."""
    return replace(config, tie_word_embeddings=False)


def quantisation_of(model: Backbone) -> QuantLayout | None:
    """The layout of the backbone's linears; None if they are not quantised."""
    return _layout_of(getattr(model.layers, LINEARS[0]).weight[...])


def head_quantisation_of(model: Backbone) -> QuantLayout | None:
    """The layout of the head; None if it is not quantised."""
    return _layout_of(model.head)


def _layout_of(weight: jax.Array | QuantArray) -> QuantLayout | None:
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
