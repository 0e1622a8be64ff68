"""The strategy *simple*, the paper's ablation: each adapted linear gets its token's experts merged just before it runs.

    W* = W + Σ_j s g_j B[e_j] A[e_j]        one linear, one token at a time; W itself stays

Importing this module registers it beside the strategies of the product, for AdaFuse and for layer-wise mixtures:

    import benchmarks.simple_merging
    Engine(model, adapter, strategy="simple")
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from adafuse_jax.adapters.adafuse import AdaFuse, AdaFuseLayer
from adafuse_jax.adapters.baselines.layerwise import LayerWise, LayerWiseHook, Mixture
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.inference.backends.registry import BACKENDS
from adafuse_jax.inference.backends.unfused import Unfused
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter, Routing
from adafuse_jax.models.layers import Linear
from pallas_kernels.sgmm import golden_terms
from pallas_kernels.sgmm.reference import merge_layer


def merged_linear(linear: Linear, experts: LoRAExperts, x: Array, routing: Routing) -> Array:
    """One token through W*."""
    terms = golden_terms(routing.experts[0, 0], routing.gates[0, 0], experts.scale)
    weight = merge_layer(linear.weight[...], experts.A[...], experts.B[...], terms)
    # The barrier makes XLA write the merged weights down, rounded, instead of fusing the merge into the product.
    return linear(x, jax.lax.optimization_barrier(weight))


class PreGatedLayer(AdaFuseLayer):
    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        if name not in self.experts:
            return linear(x)
        if name == self.adapter.first_target:
            self._route(x)
        return merged_linear(linear, self.experts[name], x, self.routing)


class LayerWiseLayer(LayerWiseHook):
    def mix(self, linear: Linear, mixture: Mixture, x: Array, routing: Routing, place: int) -> Array:
        return merged_linear(linear, mixture.lora, x, routing)


class Merging(nnx.Module):
    """The `Adapter` that merges, for a single token. The experts are cast to the weights' type."""

    def __init__(self, adapter: AdaFuse | LayerWise, dtype: Any):
        self.adapter: Any = jax.tree.map(lambda leaf: leaf, adapter)
        for experts in self.adapter.experts.values():
            if isinstance(experts, Mixture):
                experts.lora = cast(experts.lora, dtype)
        if isinstance(adapter, AdaFuse):
            self.adapter.experts = cast(self.adapter.experts, dtype)

    @property
    def experts(self) -> nnx.Dict:
        return self.adapter.experts

    def initial_routing(self, batch: int, length: int) -> Any:
        return self.adapter.initial_routing(batch, length)

    def hook(self, experts: nnx.Dict, layer: Any, routing: Any, key: Any) -> PreGatedLayer | LayerWiseLayer:
        if isinstance(self.adapter, AdaFuse):
            return PreGatedLayer(self.adapter, experts, layer, routing, key)
        return LayerWiseLayer(self.adapter, experts, layer, key)


def cast[Module](module: Module, dtype: Any) -> Module:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), module)


class Simple(Unfused):
    """The unfused backend whose adapter merges; prompts are prefilled with the adapter itself."""

    requires = "routed_lora"
    needs_adapter = True
    one_row = True

    def __init__(self, model: Backbone, adapter: Adapter | None):
        super().__init__(model, adapter, "simple")
        assert isinstance(adapter, AdaFuse | LayerWise)
        self._reads = model, Merging(adapter, model.dtype)


BACKENDS["simple"] = Simple
