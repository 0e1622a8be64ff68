"""Modules of the methods by name, and the backbone and adapter that run what was trained."""

from __future__ import annotations

import jax
from flax import nnx

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.baselines.full import FullWeights
from adafuse_jax.adapters.baselines.mola import MoLA
from adafuse_jax.adapters.baselines.moral import MoRAL
from adafuse_jax.adapters.baselines.pesc import PESC
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter

AnyAdapter = AdaFuse | MoRAL | MoLA | PESC | LoRA
MODULES: dict[str, type[AnyAdapter]] = {"adafuse": AdaFuse, "moral": MoRAL, "mola": MoLA, "pesc": PESC, "lora": LoRA}


def make_adapter(config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> AnyAdapter:
    """The adapter that `config` describes, for a backbone of `model` shapes; it changes nothing before it is trained."""
    return MODULES[config.adapter](config, model, rngs=rngs)


def resolve_forward(trained: AnyAdapter | FullWeights | None, model: Backbone) -> tuple[Backbone, Adapter | None]:
    """The backbone and the adapter to run: `trained` on `model`, or in its place; the bare backbone for None."""
    if isinstance(trained, FullWeights):
        return trained.as_backbone(model.dtype), None
    return model, trained


def num_parameters(trained: AnyAdapter | FullWeights) -> int:
    """Trainable parameters; experts that a layer of MoLA lacks are none."""
    total = sum(leaf.size for leaf in jax.tree.leaves(trained))
    if isinstance(trained, MoLA):
        size = trained.config.max_experts
        missing = sum(size - num_experts for num_experts in trained.layer_experts)
        stacked = sum(leaf.size for leaf in jax.tree.leaves(trained.experts))
        total -= stacked // (len(trained.layer_experts) * size) * missing
    return total
