"""AdaFuse: one router at the first expanded linear decides, once per token, which experts every layer uses.

    y^l = f^l(x^l) + Σ_i G^1(x^1)_i · E_i^l(x^l)        (arXiv 2603.11873, Eq. 2)

x^1 is the input of the first adapted linear of layer 0 in execution order. With q, k or v among the targets that is the
normed embedding, a function of the token id alone; with o_proj or FFN targets only, it depends on the context.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.low_rank import LoRAExperts, dropped
from adafuse_jax.adapters.router import Router, balance_loss
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.hooks import Hook, Routing, route_in_layer_0
from adafuse_jax.models.layers import Linear
from pallas_kernels.grouped_experts import TILE, saves, unsupported_reason

Products = Literal["dense", "grouped"]


def choose_products(config: AdapterConfig, model: ModelConfig, tokens: int, dtype: str) -> tuple[Products, str]:
    """The faster products of the experts for so many tokens on one device, and the reason."""
    widths = sorted({width for name in config.targets for width in model.linear_shape(name)})
    shape = tokens, config.num_experts, config.rank, config.top_k
    if (reason := unsupported_reason(*shape, widths, jnp.dtype(dtype))) is not None:
        return "dense", reason
    if not saves(*shape):
        return "dense", f"E·R = {config.num_experts * config.rank} columns for {tokens} tokens are few"
    return "grouped", f"E·R = {config.num_experts * config.rank} columns, {config.top_k * config.rank} of them chosen"


class AdaFuse(nnx.Module):
    """Router and stacked experts for a backbone of `model` shapes. Outputs equal the backbone's while every B is 0.

    Attributes:
      router: the one router, [E, in of the first target].
      experts: target name → `LoRAExperts`, A [L, E, R, in] and B [L, E, out, R].
      products: of many tokens: dense, with all experts, or grouped, with the chosen ones; `choose_products` says which is
        faster.
    """

    def __init__(self, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.num_layers = model.num_layers
        self.products: Products = "dense"
        shapes = {name: model.linear_shape(name) for name in config.targets}
        self.router = Router(
            shapes[self.first_target][1], config.num_experts, config.top_k, renormalize=config.renormalize, rngs=rngs
        )
        self.experts = nnx.Dict(
            {
                name: LoRAExperts(
                    model.num_layers, out_dim, in_dim,
                    num_experts=config.num_experts, rank=config.rank, scale=config.scale, rngs=rngs,
                )
                for name, (out_dim, in_dim) in shapes.items()
            }
        )  # fmt: skip

    def with_products(self, products: Products) -> AdaFuse:
        """This adapter, with the same parameters, and those products."""
        adapter = jax.tree.map(lambda leaf: leaf, self)
        adapter.products = products
        return adapter

    @property
    def first_target(self) -> str:
        """The first adapted linear in execution order: its input is x^1."""
        return self.config.targets[0]

    def initial_routing(self, batch: int, length: int) -> Routing:
        shape = jax.ShapeDtypeStruct((batch, length, self.router.weight.shape[-1]), jnp.float32)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(self.route, shape))

    def route(self, x: Float[Array, "B T in"]) -> Routing:
        """The routing of all layers, from the first target's input; with `products` grouped, that of its tokens' groups
        too, if they are a multiple of the tile."""
        routing = self.router(x)
        grouped = self.products == "grouped" and x.shape[0] * x.shape[1] % TILE == 0
        return routing.with_groups() if grouped else routing

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: Routing, key: Key[Array, ""] | None
    ) -> AdaFuseLayer:
        return AdaFuseLayer(self, experts, layer, routing, key)

    def balance_loss(
        self, routing: Routing, mask: Bool[Array, "B T"], load: Float[Array, " E"] | None = None
    ) -> Float[Array, ""]:
        """Balance loss of the model's only router. `load`: f_e of more tokens than those of `mask`."""
        return balance_loss(routing, mask, load=load)


class AdaFuseLayer(Hook):
    """The hook of one layer: layer 0 routes at the first target, every layer adds its chosen experts."""

    def __init__(
        self,
        adapter: AdaFuse,
        experts: nnx.Dict,
        layer: int | Int[Array, ""],
        routing: Routing,
        key: Key[Array, ""] | None,
    ):
        self.adapter, self.experts, self.layer, self.routing, self.key = adapter, experts, layer, routing, key

    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        y = linear(x)
        if name not in self.experts:
            return y
        if name == self.adapter.first_target:
            self._route(x)
        x = dropped(x, self.adapter.config.dropout, self.key, LINEARS.index(name))
        return y + self.experts[name](x, self.routing)

    def _route(self, x: Array) -> None:
        self.routing = route_in_layer_0(self.layer, lambda x, _: self.adapter.route(x), x, self.routing)
