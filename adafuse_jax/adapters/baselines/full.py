"""Full fine-tuning: θ itself trains. For small models only: weights and two moments in fp32, 12 bytes per parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.models.decoder import Backbone


class FullWeights(nnx.Module):
    """A copy of the backbone in fp32, which trains and runs in its place; it is no `Adapter`."""

    def __init__(self, config: AdapterConfig, model: Backbone):
        self.config = config
        self.backbone = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)

    def as_backbone(self, dtype: jnp.dtype) -> Backbone:
        """The backbone to run: the trained fp32 weights, rounded to `dtype`."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self.backbone)
