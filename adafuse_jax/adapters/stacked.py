"""Several adapters of one backbone as one list of C experts per linear; every row of a batch uses those of its own adapter.

    z = W_g x   [C], the routers of all adapters at once;   z_c = −∞ where expert c is of another adapter than the row's
    y = W x + Σ_j s g_j B[e_j] (A[e_j] x),   e, g of the row's own top-k and softmax,   s of its adapter

A LoRA is an adapter of one expert, whose gate is 1; a row without an adapter has gates of 0. Routers may see different
inputs: layer 0 asks each group of linears that share one, and a row takes the answer of its adapter's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.models.hooks import Hook, Routing, route_in_layer_0
from adafuse_jax.models.layers import Linear

ROUTER_INPUTS = {
    "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj",
    "gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj",
}  # fmt: skip
"""Linear → the first in execution order that has the same input."""
INPUT_NUMBERS = {name: number for number, name in enumerate(dict.fromkeys(ROUTER_INPUTS.values()))}
NO_ADAPTER = 0
"""Id of rows without an adapter, and owner of experts that no adapter has."""


def router_input(adapter: AdaFuse | LoRA) -> str:
    """The linear whose input the adapter's router sees. The gate of a LoRA is 1 whatever it sees: the first input."""
    return ROUTER_INPUTS[adapter.first_target] if isinstance(adapter, AdaFuse) else "q_proj"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTable:
    """Settings by the adapter's id, and the owner of every expert. `members[a]`: its experts in their order, then −1;
    `router_input`: of `INPUT_NUMBERS`."""

    owner: Int[Array, " C"]
    members: Int[Array, "A M"]
    top_k: Int[Array, " A"]
    renormalize: Bool[Array, " A"]
    scale: Float[Array, " A"]
    router_input: Int[Array, " A"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class StackedAdapters:
    """An `Adapter` of rows that have adapters of their own.

    `experts`: linear → C experts, of scale 1, in which a factor that an adapter lacks is zero. `routers`: input → W_g
    [C, in], fp32, zero for experts whose router has another input. `max_top_k`: of all adapters. `ids`: the adapter of
    every row; None until `of_rows`.
    """

    experts: nnx.Dict
    routers: dict[str, Float[Array, "C in"]]
    table: AdapterTable
    max_top_k: int = field(metadata={"static": True})
    ids: Int[Array, " B"] | None = None

    def initial_routing(self, batch: int, length: int) -> Routing:
        k, num_experts = self.max_top_k, len(self.table.owner)
        return Routing(
            experts=jnp.zeros((batch, length, k), jnp.int32),
            gates=jnp.zeros((batch, length, k), jnp.float32),
            probabilities=jnp.zeros((batch, length, num_experts), jnp.float32),
        )

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: Routing, key: Key[Array, ""] | None
    ) -> StackedLayer:
        return StackedLayer(self, experts, layer, routing)

    def route(self, name: str, x: Float[Array, "B T in"], routing: Routing) -> Routing:
        """`routing` with that of the rows whose router sees the input of the linear `name`, in fp32."""
        assert self.ids is not None
        table, of_row = self.table, (slice(None), None, None)
        logits = jnp.einsum(
            "bti,ci->btc", x.astype(jnp.float32), self.routers[name], precision=jax.lax.Precision.HIGHEST
        )
        own = table.owner == self.ids[:, None]
        logits = jnp.where(own[:, None], logits, -jnp.inf)
        selected, experts = jax.lax.top_k(logits, self.max_top_k)
        is_used = jnp.arange(self.max_top_k) < table.top_k[self.ids][of_row]
        of_selected = jax.nn.softmax(jnp.where(is_used, selected, -jnp.inf), axis=-1)
        of_all = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), experts, axis=-1)
        gates = jnp.where(table.renormalize[self.ids][of_row], of_selected, of_all)
        is_here = (table.router_input[self.ids] == INPUT_NUMBERS[name])[of_row]
        return replace(
            routing,
            experts=jnp.where(is_here, jnp.where(is_used, experts, experts[..., :1]), routing.experts),
            gates=jnp.where(is_here, jnp.where(is_used, gates, 0), routing.gates),
        )

    def scaled(self, gates: Float[Array, "B *T k"]) -> Float[Array, "B *T k"]:
        """The gates times their adapters' scales α/R."""
        assert self.ids is not None
        return self.table.scale[self.ids].reshape(-1, *(1,) * (gates.ndim - 1)) * gates

    def own_experts(self, routing: Routing) -> tuple[Int[Array, " M"], Int[Array, "1 T k"]]:
        """(experts of the only row's adapter, then −1; numbers among these of its tokens' experts)."""
        assert self.ids is not None
        members = self.table.members[self.ids[0]]
        return members, jnp.argmax(routing.experts[..., None] == members, axis=-1)

    def product(self, experts: LoRAExperts, x: Float[Array, "B T in"], routing: Routing) -> Float[Array, "B T out"]:
        """Σ_j s g_j B[e_j] (A[e_j] x). A prompt of one row multiplies with its own adapter's experts only."""
        assert self.ids is not None
        routing = replace(routing, gates=self.scaled(routing.gates))
        batch, length, k = routing.experts.shape
        if batch > 1 or length * k <= len(self.table.owner):
            return experts(x, routing)
        members, numbers = self.own_experts(routing)
        own = jax.tree.map(lambda factor: factor[jnp.maximum(members, 0)], experts)
        everything = jnp.zeros((batch, length, len(members)))  # one for each member; there may be more than C
        return own(x, Routing(numbers, routing.gates, everything))


class StackedLayer(Hook):
    """The hook of one layer: layer 0 routes where routers see an input, every layer adds the rows' experts."""

    def __init__(self, adapters: StackedAdapters, experts: nnx.Dict, layer: int | Int[Array, ""], routing: Routing):
        self.adapters, self.experts, self.layer, self.routing = adapters, experts, layer, routing

    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        y = linear(x)
        if name in self.adapters.routers:
            self.routing = route_in_layer_0(self.layer, partial(self.adapters.route, name), x, self.routing)
        if name not in self.experts:
            return y
        return y + self.adapters.product(self.experts[name], x, self.routing)


def of_rows[Tree](tree: Tree, ids: Int[Array, " B"] | None) -> Tree:
    """The tree with the rows' adapters in the `StackedAdapters` that it holds; itself where rows have none of their own."""
    if ids is None:
        return tree

    def bind(node: Any) -> Any:
        return replace(node, ids=ids) if isinstance(node, StackedAdapters) else node

    return jax.tree.map(bind, tree, is_leaf=lambda node: isinstance(node, StackedAdapters))
