"""Simple merge for layer-wise methods (the paper's ablation): each linear routes, and its chosen experts go into its weights
just before it runs, W* = W + Σ_j s g_j B[e_j] A[e_j]. One token, one merge per linear; W itself stays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from adafuse_jax.adapters.baselines.layerwise import LayerWise, LayerWiseHook, Mixture
from adafuse_jax.models.hooks import Routing
from adafuse_jax.models.layers import Linear
from pallas_kernels.sgmm import golden_terms
from pallas_kernels.sgmm.reference import merge_layer


class LayerWiseMerging(nnx.Module):
    """The `Adapter` that merges where a single token runs, and leaves several, a prompt, to `adapter`. The experts are cast
    to the weights' type."""

    def __init__(self, adapter: LayerWise, dtype: jnp.dtype):
        self.adapter = jax.tree.map(lambda leaf: leaf, adapter)
        for mixture in self.adapter.experts.values():
            mixture.lora = jax.tree.map(lambda leaf: leaf.astype(dtype), mixture.lora)

    @property
    def config(self):
        return self.adapter.config

    @property
    def experts(self) -> nnx.Dict:
        return self.adapter.experts

    def initial_routing(self, batch: int, length: int) -> None:
        return None

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: None, key: Key[Array, ""] | None
    ) -> LayerWiseMergingHook:
        return LayerWiseMergingHook(self.adapter, experts, layer, key)


class LayerWiseMergingHook(LayerWiseHook):
    def mix(self, linear: Linear, mixture: Mixture, x: Array, routing: Routing, place: int) -> Array:
        if x.shape[:2] != (1, 1):
            return super().mix(linear, mixture, x, routing, place)
        lora = mixture.lora
        terms = golden_terms(routing.experts[0, 0], routing.gates[0, 0], lora.scale)
        weight = merge_layer(linear.weight[...], lora.A[...], lora.B[...], terms)
        # The barrier makes XLA write the merged weights down, rounded, instead of fusing the merge into the product.
        return linear(x, jax.lax.optimization_barrier(weight))
