"""Interface of adapters to the backbone: a hook for each layer, and routings, of the whole model or of each layer's routers.

method    router                               experts see, and are                      experts per layer
adafuse   one, at the first adapted linear     its input; linear                         E
moral     each adapted linear, its input       its input; linear                         E
mola      each adapted linear, its input       its input; linear                         by depth
pesc      each layer, the FFN's input          the FFN's output; U·GELU(D h), nonlinear  E
lora      none                                 its input; linear                         one, always
full      none                                 every weight of the backbone trains       none
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from adafuse_jax.models.layers import Linear
from pallas_kernels.grouped_experts import Groups, gates_of_items, group_tokens


class TokenExperts(NamedTuple):
    """The experts that one token of every row uses, those of all routers one after the other, and their gates."""

    experts: Int[Array, "B choices"]
    gates: Float[Array, "B choices"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Routing:
    """`experts[…, j]` is used with `gates[…, j]`; `probabilities` is the softmax over all E logits.

    Routings of many routers are stacked in front: [L, routers of a layer, B, T, …]. `grouped` holds the tokens grouped by
    experts, and the gates of the groups' items, where the products are to be those of the chosen experts only.
    """

    experts: Int[Array, "*routers B T k"]
    gates: Float[Array, "*routers B T k"]
    probabilities: Float[Array, "*routers B T E"]
    grouped: tuple[Groups, Float[Array, "I tile"]] | None = None

    @classmethod
    def of_one_expert(cls, batch: int, length: int) -> Routing:
        """The routing to a single expert, with a gate of 1."""
        shape = (batch, length, 1)
        return cls(jnp.zeros(shape, jnp.int32), jnp.ones(shape), jnp.ones(shape))

    def of_first_token(self) -> TokenExperts:
        """The experts of the first token of every row."""
        of_rows = (jnp.moveaxis(x[..., 0, :], -2, 0) for x in (self.experts, self.gates))  # [B, *routers, k]
        return TokenExperts(*(x.reshape(len(x), -1) for x in of_rows))

    def with_groups(self) -> Routing:
        """The routing with the groups of its B·T tokens, a multiple of `TILE`."""
        chosen, gates = (values.reshape(-1, values.shape[-1]) for values in (self.experts, self.gates))
        groups = group_tokens(chosen, self.probabilities.shape[-1])
        return replace(self, grouped=(groups, gates_of_items(gates, chosen, groups)))

    def dense_gates(self) -> Float[Array, "*routers B T E"]:
        """Gates of all experts: exactly k nonzero per token."""
        chosen = jax.nn.one_hot(self.experts, self.probabilities.shape[-1], dtype=self.gates.dtype)  # […, k, E]
        return jnp.einsum("...k,...ke->...e", self.gates, chosen)


def route_in_layer_0(
    layer: int | Int[Array, ""],
    ask: Callable[[Float[Array, "B T in"], Routing], Routing],
    x: Float[Array, "B T in"],
    routing: Routing,
) -> Routing:
    """The routing that layer 0 asks for, with `ask(x, routing)`; the layers after it keep `routing`. `layer` is an int where
    the layers are unrolled."""
    if isinstance(layer, int):
        return ask(x, routing) if layer == 0 else routing
    return jax.lax.cond(layer == 0, ask, lambda _, routing: routing, x, routing)


class Hook:
    """One layer's view of an adapter, alive while that layer is traced. This one changes nothing.

    `routing` comes from the layer before and goes to the next; `layer_routing` is that of this layer's own routers, if it
    has any.
    """

    routing: Any = None
    layer_routing: Routing | None = None

    def __call__(self, name: str, linear: Linear, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
        """The adapted output of `linear`, which the layer calls `name`."""
        return linear(x)

    def gated(
        self,
        product: Callable[[Array, Array], Array],
        activation: str,
        gate: Float[Array, "B T F"],
        up: Float[Array, "B T F"],
    ) -> Float[Array, "B T F"]:
        """`product(gate, up)`, which is activation(gate) · up, of what the hook has returned for gate_proj and up_proj."""
        return product(gate, up)

    def residual(self, name: str, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """x + y, where y is what a block adds, by its last linear, `name`: o_proj or down_proj."""
        return x + y

    def ffn(
        self, block: Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]], x: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The adapted output of the whole feed-forward block, whose linears `__call__` adapts."""
        return block(x)


class Adapter(Protocol):
    experts: Any
    """Per-layer parameters, every leaf stacked as [L, …]."""

    def initial_routing(self, batch: int, length: int) -> Any:
        """The routing before layer 0, for tokens [B, T]; None if none is carried."""

    def hook(self, experts: Any, layer: int | Int[Array, ""], routing: Any, key: Key[Array, ""] | None) -> Hook:
        """The hook of one layer: `experts` is that layer's slice, `layer` its index (an int where the layers are
        unrolled), `routing` that of the layer before, `key` the randomness of its dropout (None: no dropout)."""
