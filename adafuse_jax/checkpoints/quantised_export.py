"""Quantised weights as exported: the format `pack-quantized` of compressed-tensors, read by vLLM and transformers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from adafuse_jax.checkpoints.weight_forms import WORD_BITS, to_words
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.registry import FAMILIES
from pallas_kernels.quantised import QuantArray, QuantLayout


def as_stored(model: Backbone) -> Backbone:
    """The backbone with the tensors of the format in the place of each quantised weight; it cannot run. Raises `UserError`
    for rows that do not fill their words."""
    config, model = model.config, jax.tree.map(lambda leaf: leaf, model)
    fused = {name: names for names in FAMILIES[config.model_type].fused for name in names}
    for name in LINEARS:
        linear = getattr(model.layers, name)
        weight = linear.weight[...]
        if isinstance(weight, QuantArray):
            in_tensor = fused.get(name, (name,))
            del linear.weight
            linear.weight_packed, linear.weight_scale = _packed(name, weight)
            if name == in_tensor[0]:
                shape = [sum(config.linear_shape(other)[0] for other in in_tensor), weight.shape[-1]]
                linear.weight_shape = nnx.Param(np.tile(np.array(shape, np.int64), (weight.shape[0], 1)))
    if isinstance(head := model.head, QuantArray):
        packed, scales = _packed("lm_head", head)
        size = nnx.Param(np.array(head.shape, np.int64))
        stored: Any = nnx.Dict(weight_packed=packed, weight_scale=scales, weight_shape=size)
        model.lm_head = stored
    return model


def _packed(name: str, weight: QuantArray) -> tuple[nnx.Param, nnx.Param]:
    """Words and scales."""
    into = weight.shape[-1]
    if into * weight.layout.bits % WORD_BITS:
        raise UserError(f"{name} has {into} inputs of {weight.layout.name}, no whole words of 32 bits; export it plain")
    return nnx.Param(jax.jit(to_words, static_argnums=1)(weight.codes, weight.layout)), nnx.Param(weight.scales)


def quantization_table(layout: QuantLayout, head: QuantLayout | None) -> dict[str, Any]:
    """`quantization_config` of an exported model, whose head is plain (None) or has a layout, too: compressed-tensors'
    `pack-quantized`."""
    groups = {"group_0": _group("Linear", layout)} | ({} if head is None else {"group_1": _group("lm_head", head)})
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": [] if head else ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def _group(target: str, layout: QuantLayout) -> dict[str, Any]:
    weights = {
        "num_bits": layout.bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None, "observer": "minmax",
        "strategy": "group" if layout.group_size else "channel", "group_size": layout.group_size, "block_structure": None,
        "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": [target], "weights": weights, "input_activations": None, "output_activations": None}
