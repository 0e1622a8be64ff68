"""A layer-wise mixture of LoRA experts on the backbone's hook, for comparison with AdaFuse: every linear has its own router.

y^l = f^l(x^l) + Σ_i G^l(x^l)_i · E_i^l(x^l)        (arXiv 2603.11873, Eq. 1)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from adafuse_jax.adapters.base import Hook
from adafuse_jax.adapters.low_rank import LoRAExperts, LoRAParam
from adafuse_jax.adapters.router import Router
from adafuse_jax.configs import AdapterConfig, ModelConfig
from adafuse_jax.model.layers import Linear


class LayerWise(nnx.Module):
    """`experts`: name of a linear → its router, [L, E, in], and its experts, as in AdaFuse."""

    def __init__(self, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        def mixture(name: str) -> nnx.Dict:
            (out_dim, in_dim), num_layers = model.linear_shape(name), model.num_layers
            router = Router(in_dim, config.num_experts, config.top_k, renormalize=config.renormalize, rngs=rngs)
            router.weight = LoRAParam(jnp.tile(router.weight[...], (num_layers, 1, 1)))
            experts = LoRAExperts(
                num_layers, out_dim, in_dim,
                num_experts=config.num_experts, rank=config.rank, scale=config.scale, rngs=rngs,
            )  # fmt: skip
            return nnx.Dict({"router": router, "lora": experts})

        self.experts = nnx.Dict({name: mixture(name) for name in config.targets})

    def initial_routing(self, batch: int, length: int) -> None:
        return None

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: None, key: Key[Array, ""] | None
    ) -> LayerWiseHook:
        return LayerWiseHook(experts)


class LayerWiseHook(Hook):
    """One layer: route and add, linear by linear."""

    def __init__(self, experts: nnx.Dict):
        self.experts = experts

    def __call__(self, name: str, linear: Linear, x: jax.Array) -> jax.Array:
        if name not in self.experts:
            return linear(x)
        mixture = self.experts[name]
        return linear(x) + mixture.lora(x, mixture.router(x))
