"""LoRA: one low-rank term per adapted linear, for every token. The baseline, and the one that merges once and for all.

    y = W x + (α/R) · B A dropout(x)        (arXiv 2106.09685)

It is stored as experts are, with E = 1: A [L, 1, R, in], B [L, 1, out, R].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.low_rank import LoRAExperts, dropped
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Hook, Routing
from adafuse_jax.models.layers import Linear


class LoRA(nnx.Module):
    """`experts`: name of a linear → its one expert."""

    def __init__(self, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.experts = nnx.Dict(
            {
                name: LoRAExperts(
                    model.num_layers, *model.linear_shape(name),
                    num_experts=1, rank=config.rank, scale=config.scale, rngs=rngs,
                )
                for name in config.targets
            }
        )  # fmt: skip

    def initial_routing(self, batch: int, length: int) -> None:
        return None

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: None, key: Key[Array, ""] | None
    ) -> LoRALayer:
        return LoRALayer(self.config, experts, key)


class LoRALayer(Hook):
    def __init__(self, config: AdapterConfig, experts: nnx.Dict, key: Key[Array, ""] | None):
        self.config, self.experts, self.key = config, experts, key

    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        y = linear(x)
        if name not in self.experts:
            return y
        always = Routing.of_one_expert(*x.shape[:2])
        return y + self.experts[name](dropped(x, self.config.dropout, self.key, LINEARS.index(name)), always)


def merged(model: Backbone, lora: LoRA) -> Backbone:
    """The backbone with W + (α/R) B A for every adapted W, one rounding; all other weights are reused without a copy."""

    @jax.jit
    def add(weight: Array, a: Array, b: Array) -> Array:
        a, b = (x[:, 0].astype(jnp.float32) for x in (a, b))
        delta = jnp.einsum("lor,lri->loi", b, a, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + lora.config.scale * delta).astype(weight.dtype)

    model = jax.tree.map(lambda leaf: leaf, model)
    for name, expert in lora.experts.items():
        linear = getattr(model.layers, name)
        linear.weight = linear.weight.replace(add(linear.weight[...], expert.A[...], expert.B[...]))
    return model
