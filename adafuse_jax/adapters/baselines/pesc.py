"""PESC (arXiv 2401.02731): a router per layer reads the FFN's input x; the experts act on its output h, and are not linear.

    h = FFN(x),    out = h + Σ_i G(x)_i · s · U_i GELU(D_i dropout(h)),    s = α/R

A = D [L, E, R, D] and B = U [L, E, D, R] of `low_rank`, with width R. Because of the GELU no weight can take the experts in:
PESC decodes unmerged. The authors' script trains a LoRA beside it, merged afterwards; it is not part of this one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.baselines.layerwise import Mixture
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.low_rank import dropped
from adafuse_jax.adapters.router import balance_loss
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.hooks import Hook, Routing


def gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class PESC(nnx.Module):
    """`experts`: one `Mixture` per layer."""

    def __init__(self, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = model.embed_dim
        self.experts = Mixture(config, model.num_layers, width, width, activation=gelu, rngs=rngs)

    def initial_routing(self, batch: int, length: int) -> None:
        return None

    def hook(
        self, experts: Mixture, layer: int | Int[Array, ""], routing: None, key: Key[Array, ""] | None
    ) -> PESCLayer:
        return PESCLayer(self.config, experts, key)

    def balance_loss(self, routing: Routing, mask: Bool[Array, "B T"]) -> Float[Array, ""]:
        """Mean over the layers; `routing` is stacked as [L, 1, …]."""
        return balance_loss(routing, mask).mean()


class PESCLayer(Hook):
    def __init__(self, config: AdapterConfig, experts: Mixture, key: Key[Array, ""] | None):
        self.config, self.experts, self.key = config, experts, key

    def ffn(self, block: Callable[[Array], Array], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        routing = self.experts.router(x)
        self.layer_routing = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), routing)
        h = block(x)
        return h + self.experts.lora(dropped(h, self.config.dropout, self.key, len(LINEARS)), routing)
