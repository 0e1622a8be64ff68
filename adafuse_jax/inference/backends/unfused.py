"""The unfused backend: the backbone's layers in few kernel launches on a GPU, else in separate XLA ops; the experts beside
the weights.

y = W x + Σ_j g_j s B[e_j] (A[e_j] x)
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.backends import portable
from adafuse_jax.inference.backends.base import Backend, StepOutput, dispatch_log_level
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.quantised import quantisation_of

log = logging.getLogger(__name__)

MEGAKERNEL_ROWS = 16
"""Rows that the megakernel decodes faster than the layer kernels, if the weights are not quantised."""


class Unfused(Backend):
    """Any model, any adapter, any number of rows and devices. `for_batch` gives the kernels where they can run."""

    takes_bank = True
    reads_quantised = True

    def __init__(self, model: Backbone, adapter: Adapter | AdapterBank | None, strategy: str = "unmerged"):
        self._model, self._adapter, self.strategy = model, adapter, strategy
        self._reads: tuple[Any, ...] = model, adapter
        self._kernels: LayerKernels | None = None
        self._reasons: dict[int, str | None] = {}

    def for_batch(self, batch: int) -> Backend:
        super().for_batch(batch)
        if batch not in self._reasons:
            model, adapter = self.reads
            self._reasons[batch] = reason = portable.unsupported_reason(model, adapter, batch)
            how = "five kernel launches a layer" if reason is None else f"XLA ops: the kernels cannot, as {reason}"
            log.log(dispatch_log_level(), "decoding %d rows %s in %s", batch, self.strategy, how)
        if self._reasons[batch] is not None:
            return self
        self._kernels = self._kernels or LayerKernels(self._model, self._reads[1], self.strategy)
        return self._kernels

    def faster_reason(self, batch: int) -> str | None:
        """The reason to take the layer kernels: an H200 was faster with them (docs/kernels/megakernel.md)."""
        model, adapter = self.reads
        if portable.unsupported_reason(model, adapter, batch) is not None or quantisation_of(model) is not None:
            return None
        if batch > MEGAKERNEL_ROWS:
            return f"the layer kernels decode more than {MEGAKERNEL_ROWS} rows faster (7B, 32 rows: 5.6 ms against 7.1)"
        return None

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


class LayerKernels(Unfused):
    """The unfused step in five kernel launches a layer, where `portable` supports it. It reads the experts in the model's
    type."""

    takes_wider_cache = True

    def __init__(self, model: Backbone, adapter: Any, strategy: str = "unmerged"):
        super().__init__(model, adapter, strategy)
        if isinstance(adapter, AdaFuse | LoRA):  # those of a bank have it
            read = jax.tree.map(lambda leaf: leaf, adapter)
            read.experts = jax.tree.map(lambda leaf: leaf.astype(model.dtype), adapter.experts)
            self._reads = model, read

    def for_batch(self, batch: int) -> Backend:
        return self

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
        # A bank's adapters may outgrow the kernels.
        if reason := portable.shape_unsupported_reason(model, adapter, len(token)):
            log.log(dispatch_log_level(), "decoding %d rows in XLA ops: the kernels cannot, as %s", len(token), reason)
            if len(token) == cache.k.shape[1]:
                return Unfused.step(reads, carry, token, position, cache, hold)
            rows = jnp.arange(len(token))
            logits, experts, new, carry = Unfused.step(reads, carry, token, position, cache.of_rows(rows), hold)
            return logits, experts, cache.with_rows(rows, new), carry
        return *portable.portable_step(model, adapter, token, position, cache), carry
