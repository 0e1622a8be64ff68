"""Decoding by merging: add the token's experts to the weights, then run the plain backbone (arXiv 2603.11873, Eqs. 3, 6, 9).

    golden   W*  = W⁰ + Δ(g^t)                       one SGMM into a second copy of the adapted weights; exact
    switch   W^t = W^{t−1} + Δ(g^t) − Δ(g^{t−1})      one SGMM in place; each rounding stays in the weights
    simple   W*  = W⁰ + Δ(g^t)                       layer by layer, one linear at a time; exact, the paper's ablation

with Δ(g) = Σ_j s g_j B[e_j] A[e_j] for every adapted linear W [L, out, in]. One set of weights serves one token, so all of
them decode a single row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.inference.config import Strategy
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Hook, Routing
from adafuse_jax.models.layers import Linear
from pallas_kernels.sgmm import golden_terms, sgmm, switch_terms
from pallas_kernels.sgmm.reference import merge_layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What is merged at present: `weights` = W⁰ + Δ(`gates` of `experts`), by the name of the linear.

    golden: the second copy; switch: the only one, which the backbone lacks; simple: empty, as no weights outlive a token.
    """

    strategy: Strategy = field(metadata={"static": True})
    weights: dict[str, Float[Array, "L out in"]]
    experts: Int[Array, " k"]
    gates: Float[Array, " k"]

    @classmethod
    def nothing(cls, strategy: Strategy, model: Backbone, adapter: AdaFuse) -> Merged:
        """Gates of 0. *golden* allocates its copy; the weights of *switch* are the model's own."""
        weights = {} if strategy == "simple" else adapted_weights(model, adapter)
        if strategy == "golden":
            weights = {name: jnp.copy(w) for name, w in weights.items()}
        k = adapter.config.top_k
        return cls(strategy=strategy, weights=weights, experts=jnp.zeros(k, jnp.int32), gates=jnp.zeros(k, jnp.float32))


def adapted_weights(model: Backbone, adapter: AdaFuse) -> dict[str, Float[Array, "L out in"]]:
    return {name: getattr(model.layers, name).weight[...] for name in adapter.config.targets}


def factors(adapter: AdaFuse) -> tuple[dict[str, Array], dict[str, Array]]:
    """A [L, E, R, in] and B [L, E, out, R] by name."""
    experts = adapter.experts.items()
    return {name: e.A[...] for name, e in experts}, {name: e.B[...] for name, e in experts}


def with_weights(model: Backbone, weights: Mapping[str, Float[Array, "L out in"] | None]) -> Backbone:
    """The model with these weights in these linears; it shares all the rest. None leaves a linear without weights."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, weight in weights.items():
        linear = getattr(model.layers, name)
        linear.weight = linear.weight.replace(weight)
    return model


@partial(jax.jit, donate_argnames="merged")
def unmerge(adapter: AdaFuse, merged: Merged) -> Merged:
    """*switch*: W − Δ(g), the step to gates of 0. Without anything merged, every bit stays as it is."""
    nothing = merged.experts, jnp.zeros_like(merged.gates)
    terms = switch_terms((merged.experts, merged.gates), nothing, adapter.config.scale)
    return replace(merged, weights=sgmm(merged.weights, *factors(adapter), terms), gates=nothing[1])


def update_merged(
    adapter: AdaFuse,
    model: Backbone,
    before: Merged,
    experts: Int[Array, " k"],
    gates: Float[Array, " k"],
    *,
    hold: Bool[Array, ""],
) -> Merged:
    """What is merged for the next token; with `hold`, what was for the last. *switch* never reads the adapted weights of
    `model`, W⁰."""
    scale = adapter.config.scale
    experts = jnp.where(hold, before.experts, experts)
    gates = jnp.where(hold, before.gates, gates)
    weights = before.weights
    if before.strategy == "golden":
        terms, pristine = golden_terms(experts, gates, scale), adapted_weights(model, adapter)
        weights = sgmm(weights, *factors(adapter), terms, pristine=pristine)
    elif before.strategy == "switch":
        terms = switch_terms((before.experts, before.gates), (experts, gates), scale)
        weights = sgmm(weights, *factors(adapter), terms)
    return replace(before, weights=weights, experts=experts, gates=gates)


class Merging:
    """The `Adapter` that merges: what travels from layer to layer is (routing, what is merged).

    Args:
      adapter: its experts are of the weights' type.
      model: the backbone, W⁰; *switch* never reads its adapted weights.
      merged: what the token before left behind.
      hold: keep the gates of `merged`, whatever the router says: a row that has ended changes no weights.
    """

    def __init__(self, adapter: AdaFuse, model: Backbone, merged: Merged, hold: Bool[Array, ""]):
        self.adapter, self.model, self.before, self.hold = adapter, model, merged, hold
        self.experts = adapter.experts

    def initial_routing(self, batch: int, length: int) -> tuple[Routing, Merged]:
        return self.adapter.initial_routing(batch, length), self.before

    def hook(
        self,
        experts: nnx.Dict,
        layer: int | Int[Array, ""],
        routing: tuple[Routing, Merged],
        key: Key[Array, ""] | None,
    ) -> MergingLayer:
        return MergingLayer(self, experts, layer, routing)

    def merge(self, x: Float[Array, "1 1 in"]) -> tuple[Routing, Merged]:
        """Route one token by x^1, and merge its experts into the weights of all layers."""
        routing = self.adapter.router(x)
        chosen = routing.experts[0, 0], routing.gates[0, 0]
        return routing, update_merged(self.adapter, self.model, self.before, *chosen, hold=self.hold)


class MergingLayer(Hook):
    """The hook of one layer: layer 0 merges at the first target, every adapted linear runs with its merged weights."""

    def __init__(
        self, merging: Merging, experts: nnx.Dict, layer: int | Int[Array, ""], routing: tuple[Routing, Merged]
    ):
        self.merging, self.experts, self.layer, self.routing = merging, experts, layer, routing

    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        adapter = self.merging.adapter
        if name not in self.experts:
            return linear(x)
        assert isinstance(self.layer, int), "merging decodes with unrolled layers"
        if self.layer == 0 and name == adapter.first_target:
            self.routing = self.merging.merge(x)
        _, merged = self.routing
        if merged.strategy != "simple":
            return linear(x, merged.weights[name][self.layer])
        experts, terms = self.experts[name], golden_terms(merged.experts, merged.gates, adapter.config.scale)
        weight = merge_layer(linear.weight[...], experts.A[...], experts.B[...], terms)
        # The barrier makes XLA write the merged weights down, rounded, instead of fusing the merge into the product.
        return linear(x, jax.lax.optimization_barrier(weight))
