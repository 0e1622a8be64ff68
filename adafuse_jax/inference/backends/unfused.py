"""The unfused backend: the backbone's layers in separate XLA ops, the experts beside the weights.

y = W x + Σ_j g_j s B[e_j] (A[e_j] x)
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Int

from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.backends.base import Backend, StepOutput
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter
from adafuse_jax.models.kv_cache import KVCache


class Unfused(Backend):
    """Any model, any adapter, any number of rows and devices."""

    takes_bank = True

    def __init__(self, model: Backbone, adapter: Adapter | AdapterBank | None, strategy: str = "unmerged"):
        self._model, self._adapter, self.strategy = model, adapter, strategy
        self._reads: tuple[Any, ...] = model, adapter

    @staticmethod
    def step(
        reads: Any,
        carry: Any,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        cache: KVCache,
        hold: Bool[Array, " B"],
    ) -> StepOutput:
        model, adapter = reads
        out = model.run(token[:, None], adapter=adapter, positions=position[:, None], cache=cache, unroll=True)
        experts = None if out.routing is None else out.routing.of_first_token()
        return model.logits(out.hidden[:, 0]), experts, out.cache, carry
