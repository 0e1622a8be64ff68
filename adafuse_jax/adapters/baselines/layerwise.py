"""Layer-wise mixtures: every adapted linear of every layer has a router of its own, on its own input.

    y^l = f^l(x^l) + Σ_i G^l(x^l)_i · E_i^l(x^l),    G = Softmax(TopK(W_g x))        (arXiv 2603.11873, Eq. 1)

W_g [L, E, in] per linear. MoRAL and MoLA are this; they differ in the experts that a layer has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.low_rank import LoRAExperts, dropped
from adafuse_jax.adapters.router import Router, balance_loss
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.hooks import Hook, Routing
from adafuse_jax.models.layers import Linear


class Mixture(nnx.Module):
    """Router and low-rank experts of one place in every layer, A [L, E, R, in], B [L, E, out, R]."""

    def __init__(self, config: AdapterConfig, num_layers: int, out_dim: int, in_dim: int, *, rngs: nnx.Rngs, **options):
        size = config.max_experts
        self.router = Router(
            in_dim, size, config.top_k, renormalize=config.renormalize, num_layers=num_layers, rngs=rngs
        )
        self.lora = LoRAExperts(
            num_layers, out_dim, in_dim,
            num_experts=size, rank=config.rank, scale=config.scale, rngs=rngs, **options,
        )  # fmt: skip


class LayerWise(nnx.Module):
    """`experts`: name of a linear → `Mixture`. Layer l has the first `layer_experts[l]` of the E experts."""

    def __init__(self, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layer_experts = self.experts_of_layers(config, model.num_layers)
        self.experts = nnx.Dict(
            {name: Mixture(config, model.num_layers, *model.linear_shape(name), rngs=rngs) for name in config.targets}
        )

    @staticmethod
    def experts_of_layers(config: AdapterConfig, num_layers: int) -> tuple[int, ...]:
        return (config.num_experts,) * num_layers

    def initial_routing(self, batch: int, length: int) -> None:
        return None

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: None, key: Key[Array, ""] | None
    ) -> LayerWiseHook:
        return LayerWiseHook(self, experts, layer, key)

    def balance_loss(self, routing: Routing, mask: Bool[Array, "B T"]) -> Float[Array, ""]:
        """Mean over all routers; `routing` is stacked as [L, routers, …]."""
        return balance_loss(routing, mask, jnp.array(self.layer_experts)[:, None]).mean()


class LayerWiseHook(Hook):
    """One layer: route and add, linear by linear. `layer_routing` [routers, …] is in execution order."""

    def __init__(self, adapter: LayerWise, experts: nnx.Dict, layer: int | Int[Array, ""], key: Key[Array, ""] | None):
        self.config, self.experts, self.key = adapter.config, experts, key
        counts = adapter.layer_experts
        self.available = None if min(counts) == max(counts) else jnp.array(counts)[layer]
        self._routings: list[Routing] = []

    @property
    def layer_routing(self) -> Routing:  # type: ignore[override]
        return jax.tree.map(lambda *routings: jnp.stack(routings), *self._routings)

    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        if name not in self.experts:
            return linear(x)
        return self.mix(linear, self.experts[name], x, self.route(name, x), LINEARS.index(name))

    def route(self, name: str, x: Array) -> Routing:
        self._routings.append(self.experts[name].router(x, self.available))
        return self._routings[-1]

    def mix(self, linear: Linear, mixture: Mixture, x: Array, routing: Routing, place: int) -> Array:
        return linear(x) + mixture.lora(dropped(x, self.config.dropout, self.key, place), routing)
