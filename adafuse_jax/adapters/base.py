"""What the backbone asks of an adapter: a hook for each layer, and a routing that travels from layer to layer."""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Int, Key

from adafuse_jax.model.layers import Linear


class LayerHook(Protocol):
    """One layer's view of an adapter, alive while that layer is traced."""

    routing: Any

    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        """The adapted output [B, T, out] of `linear`, which the layer calls `name`, at its input x [B, T, in]."""


class Adapter(Protocol):
    experts: Any
    """Per-layer parameters, every leaf stacked as [L, …]."""

    def initial_routing(self, batch: int, length: int) -> Any:
        """The routing before layer 0, for tokens [B, T]."""

    def hook(self, experts: Any, layer: int | Int[Array, ""], routing: Any, key: Key[Array, ""] | None) -> LayerHook:
        """The hook of one layer: `experts` is that layer's slice, `layer` its index (an int where the
        layers are unrolled), `routing` what the layer before left, `key` the
        randomness of its dropout (None: no dropout)."""
