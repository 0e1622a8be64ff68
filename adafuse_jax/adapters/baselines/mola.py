"""MoLA (arXiv 2402.08562): a layer-wise mixture whose number of experts N_l grows with depth, 2/4/6/8 by quarters.

    loss = Σ_l N_l · Σ_e f_e P_e

Arrays are stacked with the largest number of experts; those that a layer lacks are zeros that no router can choose, and do
not count as parameters. A layer with several adapted linears counts once in the loss, with the mean of their routers.
The experts of one linear share a dropout mask (the authors' code draws one for each).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from adafuse_jax.adapters.baselines.layerwise import LayerWise
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.hooks import Routing


class MoLA(LayerWise):
    def __init__(self, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        is_valid = jnp.arange(config.max_experts) < jnp.array(self.layer_experts)[:, None]  # [L, E]
        for mixture in self.experts.values():
            mixture.router.weight[...] = jnp.where(is_valid[..., None], mixture.router.weight[...], 0)
            mixture.lora.A[...] = jnp.where(is_valid[..., None, None], mixture.lora.A[...], 0)

    @staticmethod
    def experts_of_layers(config: AdapterConfig, num_layers: int) -> tuple[int, ...]:
        """N_l: part ⌊l · parts / L⌋ of `experts_per_layer`."""
        parts = config.experts_per_layer
        if len(parts) > num_layers:
            raise UserError(
                f"--experts-per-layer {' '.join(map(str, parts))}: the model has {num_layers} layers; give at most as many"
            )
        return tuple(parts[layer * len(parts) // num_layers] for layer in range(num_layers))

    def balance_loss(self, routing: Routing, mask: Bool[Array, "B T"]) -> Float[Array, ""]:
        return len(self.layer_experts) * super().balance_loss(routing, mask)
