"""AdaFuse, or a bank of adapters, while it reads prompts: tokens are routed before the layers, and multiplied with their
chosen experts only.

A router inside a scan over layers makes a GPU wait for the host in every layer, to ask whether it is the first.

Outputs of linears are passed over as seldom as can be. XLA has cuBLAS add one array to a product: of q, k and v what the
experts give, of o and down the residual x, to which the experts' products are then added in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.stacked import ROUTER_INPUTS, StackedAdapters
from adafuse_jax.models.config import ATTENTION_LINEARS, LINEARS, ModelConfig
from adafuse_jax.models.hooks import Hook, Routing
from adafuse_jax.models.layers import Linear
from pallas_kernels.prompt_experts import (
    TOKEN_TILE,
    Pairs,
    expand,
    expand_gated,
    expand_into,
    pair_tokens,
    shrink,
    unsupported_reason,
)

LEAST_TOKENS, LEAST_COLUMNS, LEAST_SPARSITY = 512, 256, 4
"""Prompt tokens, columns E·R and E / k below which the products of all experts are taken to be as fast.
`python -m benchmarks.decode.prefill --targets all7 all7-dense` compares both."""
GATED, LAST = ("gate_proj", "up_proj"), ("o_proj", "down_proj")


def is_routed_by_token(adapter: AdaFuse | StackedAdapters) -> bool:
    """Return whether x^1, the input of every router, depends on the token alone."""
    if isinstance(adapter, StackedAdapters):
        return {*adapter.routers} == {ATTENTION_LINEARS[0]}
    return adapter.first_target in ATTENTION_LINEARS[:3]


def all_experts_reason(
    adapter: AdaFuse | StackedAdapters, model: ModelConfig, tokens: int, dtype: jnp.dtype
) -> str | None:
    """The reason why prompts' tokens, so many together, are multiplied with all experts of their adapter, or None."""
    widths = sorted({width for name in adapter.experts for width in model.linear_shape(name)})
    if not is_routed_by_token(adapter):
        if isinstance(adapter, StackedAdapters) and not adapter.routers:
            return "no adapter is loaded"
        return "a router sees the input of a later linear than q, k and v, which is not known before the layers"
    rank = next(iter(adapter.experts.values())).A.shape[2]
    if reason := unsupported_reason(rank, widths, dtype):
        return reason
    if any(leaf.dtype != dtype for leaf in jax.tree.leaves(adapter.experts)):
        return f"the experts are not {jnp.dtype(dtype).name}"
    if tokens % TOKEN_TILE:
        return f"{tokens} tokens are no multiple of {TOKEN_TILE}"
    if isinstance(adapter, StackedAdapters):  # the products of all experts copy those of the row's adapter
        return None
    config = adapter.config
    if tokens < LEAST_TOKENS:
        return f"{tokens} tokens are few"
    if (columns := config.num_experts * config.rank) < LEAST_COLUMNS:
        return f"E·R = {columns} columns are few"
    if config.num_experts < LEAST_SPARSITY * config.top_k:
        return f"a token uses {config.top_k} of {config.num_experts} experts"
    return None


@jax.tree_util.register_dataclass
@dataclass(slots=True)
class PromptAdapter:
    """An `Adapter`: one whose routing of the tokens is known. `pairs`: their orders, for the products of the chosen experts;
    None: all experts are multiplied. `plain_residual`: outputs of o_proj and down_proj are added to x as is."""

    adapter: AdaFuse | StackedAdapters
    experts: Any
    routing: Routing
    pairs: Pairs | None
    plain_residual: bool = field(metadata={"static": True})

    @classmethod
    def of(
        cls, adapter: AdaFuse | StackedAdapters, x: Float[Array, "B T in"], model: ModelConfig, *, only_chosen: bool
    ) -> PromptAdapter:
        """Route the tokens by x^1. The rows of a bank must be one where `only_chosen`."""
        plain_residual = model.norm_placement == "pre" and model.residual_multiplier == 1
        if isinstance(adapter, StackedAdapters):
            routing = adapter.route(ATTENTION_LINEARS[0], x, adapter.initial_routing(*x.shape[:2]))
            pairs = _pairs_of_row(adapter, routing) if only_chosen else None
        else:
            routing, config = adapter.route(x), adapter.config
            chosen, gates = (value.reshape(-1, config.top_k) for value in (routing.experts, routing.gates))
            pairs = pair_tokens(chosen, gates, config.num_experts, config.scale) if only_chosen else None
        return cls(adapter, adapter.experts, routing, pairs, plain_residual)

    def initial_routing(self, batch: int, length: int) -> Routing:
        return self.routing

    def hook(self, experts: Any, layer: int | Int[Array, ""], routing: Routing, key: Key[Array, ""] | None) -> Hook:
        if self.pairs is None:
            return self.adapter.hook(experts, 1, self.routing, key)  # no layer is the one that routes
        return PromptLayer(self, layer)


def _pairs_of_row(adapter: StackedAdapters, routing: Routing) -> Pairs:
    """The orders of a row's tokens, by the experts of its own adapter, with these experts' places in the bank."""
    members, numbers = adapter.own_experts(routing)
    gates = adapter.scaled(routing.gates)[0]
    pairs = pair_tokens(numbers[0], gates, len(members), 1.0)
    places = jnp.append(jnp.maximum(members, 0), len(adapter.table.owner))
    return replace(pairs, expert=places[pairs.expert], used=places[pairs.used])


class PromptLayer(Hook):
    """The hook of one layer: linears that share an input share one launch of A's products. What the experts give to
    gate_proj and up_proj is added where these are multiplied; to o_proj and down_proj, where they are added to x."""

    def __init__(self, prompts: PromptAdapter, layer: int | Int[Array, ""]):
        self.prompts, self.layer, self.routing = prompts, jnp.asarray(layer, jnp.int32)[None], prompts.routing
        self._h: dict[str, Float[Array, "n P R"]] = {}
        self._options: Any = {"interpret": jax.default_backend() == "cpu"}

    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        y = linear(x)
        if name not in self.prompts.experts:
            return y
        self._shrink(name, x)
        is_later = self._adapts_both() if name in GATED else self._in_residual(name)
        return y if is_later else y + self._expanded(name).reshape(y.shape)

    def gated(self, product: Callable[[Array, Array], Array], activation: str, gate: Array, up: Array) -> Array:
        if not self._adapts_both():
            return product(gate, up)
        if activation != "silu":
            outputs = zip(GATED, (gate, up), strict=True)
            return product(*(y + self._expanded(name).reshape(y.shape) for name, y in outputs))
        experts = self.prompts.experts
        flat_gate, flat_up = (y.reshape(-1, y.shape[-1]) for y in (gate, up))
        factors = [experts[name].B[...] for name in GATED]
        found = expand_gated(flat_gate, flat_up, self._h[GATED[0]], factors, self.layer, self._pairs, **self._options)
        return found.reshape(gate.shape)

    def residual(self, name: str, x: Array, y: Array) -> Array:
        if not self._in_residual(name):
            return x + y
        flat, (h, factor) = x.reshape(-1, x.shape[-1]), self._products(name)
        return expand_into(flat, h, factor, self.layer, self._pairs, **self._options).reshape(x.shape) + y

    @property
    def _pairs(self) -> Pairs:
        assert self.prompts.pairs is not None
        return self.prompts.pairs

    def _adapts_both(self) -> bool:
        return all(name in self.prompts.experts for name in GATED)

    def _in_residual(self, name: str) -> bool:
        return name in LAST and name in self.prompts.experts and self.prompts.plain_residual

    def _sharing(self, name: str) -> list[str]:
        """The adapted linears that share an input with this one, in order."""
        return [
            other for other in LINEARS if other in self.prompts.experts and ROUTER_INPUTS[other] == ROUTER_INPUTS[name]
        ]

    def _shrink(self, name: str, x: Array) -> None:
        """Compute h of the linears that share x, unless one of them has come already."""
        source = ROUTER_INPUTS[name]
        if source not in self._h:
            factors = [self.prompts.experts[other].A[...] for other in self._sharing(name)]
            self._h[source] = shrink(x.reshape(-1, x.shape[-1]), factors, self.layer, self._pairs, **self._options)

    def _products(self, name: str) -> tuple[Array, Array]:
        """(h of the linears that share this one's input, this one's B)."""
        return self._h[ROUTER_INPUTS[name]], self.prompts.experts[name].B[...]

    def _expanded(self, name: str) -> Float[Array, "T out"]:
        """Sum of the experts of each token."""
        place = self._sharing(name).index(name)
        return expand(*self._products(name), self.layer, self._pairs, linear=place, **self._options)
