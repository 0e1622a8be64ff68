"""Adapters of one backbone, loaded and unloaded while rows decode: several AdaFuse adapters and LoRAs as one list of experts.

    bank = AdapterBank(model, max_experts=64)
    loaded = bank.load("poems", adapter)            # AdaFuse: its num_experts; a LoRA: one expert
    slots = Engine(model, bank).slots(32, context_length=4096)
    slots.insert(prompt, max_new_tokens=100, adapter="poems")
    bank.unload("poems")                            # free once its last row is evicted
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.models.decoder import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An adapter in the bank. `version` is never used again; `places[e]` is expert e's in the list of all."""

    name: str
    version: int
    method: str
    top_k: int
    places: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return len(self.places)


class AdapterBank:
    """Stacked experts and routers of the adapters that rows may name; stands in an adapter's place in `Engine`.

    Args:
      model: their backbone.
      max_experts: of all adapters together.
    """

    def __init__(self, model: Backbone, *, max_experts: int):
        raise NotImplementedError

    @property
    def adapters(self) -> Mapping[str, Loaded]:
        """The adapters that new rows may name."""
        raise NotImplementedError

    @property
    def free_experts(self) -> int:
        """Experts that may still be loaded."""
        raise NotImplementedError

    def load(self, name: str, adapter: AnyAdapter) -> Loaded:
        """Put an adapter into the stacked buffers; running rows go on. Raises `UserError`: the name is in use, the adapter
        does not fit or has routers in its layers, or weights that are not finite."""
        raise NotImplementedError

    def unload(self, name: str) -> None:
        """Remove a name; its experts are free once its last row is evicted. Raises `UserError`: there is none."""
        raise NotImplementedError
