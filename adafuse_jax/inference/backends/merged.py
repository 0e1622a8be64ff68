"""Merging backends: experts go into the weights, then the bare backbone runs (arXiv 2603.11873, Eqs. 3, 6, 9).

    golden   W*  = W⁰ + Δ(g^t)                       one SGMM per token into a second copy of the adapted weights; exact
    switch   W^t = W^{t−1} + Δ(g^t) − Δ(g^{t−1})      one SGMM per token in place; each rounding stays in the weights
    merged   W*  = W⁰ + (α/R) B A                    a LoRA, once before decoding; exact

with Δ(g) = Σ_j s g_j B[e_j] A[e_j] for every adapted linear W [L, out, in]. With golden and switch one set of weights serves
one token, so they decode one row. The bare backbone is the megakernel's where that can run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.lora import merged as with_lora
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.base import Backend, StepOutput, dispatch_log_level
from adafuse_jax.inference.backends.megakernel import (
    Fused,
    Megakernel,
    default_unsupported_reason,
)
from adafuse_jax.inference.backends.unfused import Unfused
from adafuse_jax.inference.routing import route
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache
from pallas_kernels.sgmm import golden_terms, sgmm, switch_terms

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The carry: `weights` = W⁰ + Δ(`gates` of `experts`), by the name of the linear. golden: the second copy; switch: the
    only one, which the backbone lacks."""

    strategy: Literal["golden", "switch"] = field(metadata={"static": True})
    weights: dict[str, Float[Array, "L out in"]]
    experts: Int[Array, " k"]
    gates: Float[Array, " k"]

    @classmethod
    def nothing(cls, strategy: Literal["golden", "switch"], model: Backbone, adapter: AdaFuse) -> Merged:
        """Gates of 0. *golden* allocates its copy; the weights of *switch* are the model's own."""
        weights = adapted_weights(model, adapter)
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
    """The model with these weights in these linears, all other arrays reused. None leaves a linear without weights."""
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
    """Merge for the next token; with `hold`, the gates stay those of the last. *switch* never reads the adapted weights of
    `model`, W⁰."""
    scale = adapter.config.scale
    experts = jnp.where(hold, before.experts, experts)
    gates = jnp.where(hold, before.gates, gates)
    if before.strategy == "golden":
        terms, pristine = golden_terms(experts, gates, scale), adapted_weights(model, adapter)
        weights = sgmm(before.weights, *factors(adapter), terms, pristine=pristine)
    else:
        terms = switch_terms((before.experts, before.gates), (experts, gates), scale)
        weights = sgmm(before.weights, *factors(adapter), terms)
    return replace(before, weights=weights, experts=experts, gates=gates)


class Golden(Backend):
    """Each token's experts in a second copy of the adapted weights. The adapter's experts are cast to the weights' type."""

    strategy = "golden"
    requires = "pre_gated"
    needs_adapter = True
    one_row = True
    _merges: ClassVar[Literal["golden", "switch"]] = "golden"

    def __init__(self, model: Backbone, adapter: AdaFuse):
        adapter = jax.tree.map(lambda leaf: leaf, adapter)
        adapter.experts = jax.tree.map(lambda leaf: leaf.astype(model.dtype), adapter.experts)
        self._carry: Merged | None = Merged.nothing(self._merges, model, adapter)
        self._model, self._adapter, fused = model, adapter, None
        if bare_unsupported_reason(self.strategy, model) is None:
            fused = Fused.of(model, adapter, merged=True)
        self._reads = model, adapter, fused

    @property
    def merged(self) -> Merged:
        """The weights at present."""
        if self._carry is None:
            raise UserError("a decoding step failed and took the merged weights with it; load the model again")
        return self._carry

    @staticmethod
    def step(
        reads: Any,
        carry: Any,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        cache: KVCache,
        hold: Bool[Array, " B"],
    ) -> StepOutput:
        model, adapter, fused = reads
        # Nothing adapted runs before the router: with *switch*, those weights are only named here.
        table = None if fused is None else fused.table
        chosen = route(with_weights(model, carry.weights), adapter, table, token, position, cache)
        carry = update_merged(adapter, model, carry, chosen.experts[0], chosen.gates[0], hold=hold[0])
        whole = with_weights(model, carry.weights)
        if fused is None:
            logits, _, cache, _ = Unfused.step((whole, None), None, token, position, cache, hold)
        else:
            logits, _, cache, _ = Megakernel.step((whole, None, fused), None, token, position, cache, hold)
        return logits, chosen, cache, carry

    def take_carry(self) -> Merged:
        carry, self._carry = self.merged, None  # a step that fails has consumed it
        return carry

    def put_carry(self, carry: Merged) -> None:
        self._carry = carry


class Switch(Golden):
    """Each token's experts in the only copy of the adapted weights, which it takes over from the model: use `model` instead.

    The weights drift: every step rounds them once more, and `restore` takes out Δ(g), not the roundings.
    """

    strategy = "switch"
    _merges = "switch"

    def __init__(self, model: Backbone, adapter: AdaFuse):
        super().__init__(model, adapter)
        bare = with_weights(model, dict.fromkeys(self.merged.weights))
        self._model, self._reads = bare, (bare, *self._reads[1:])
        self._is_merged = False
        log.info(
            "decoding switch: every token rounds the weights once more, and these errors add up until the model is loaded "
            "again; golden is exact"
        )

    @property
    def model(self) -> Backbone:
        """The model with its experts unmerged; valid until the next step, to which its adapted weights are donated."""
        self.restore()
        return with_weights(self._model, self.merged.weights)

    def take_carry(self) -> Merged:
        self._is_merged = False
        return super().take_carry()

    def put_carry(self, carry: Merged) -> None:
        self._carry, self._is_merged = carry, True

    def restore(self) -> None:
        if self._is_merged:
            self._carry = unmerge(self._adapter, self.take_carry())


class MergedLoRA(Unfused):
    """A LoRA merged once into a copy of the adapted weights; then the bare backbone decodes."""

    requires = "static"
    needs_adapter = True
    reads_quantised = False

    @classmethod
    def prepare(cls, model: Backbone, adapter: LoRA) -> Backend:
        model = with_lora(model, adapter)
        unfused = cls(model, None, "merged")
        reason = bare_unsupported_reason("merged", model)
        return unfused if reason else Megakernel(model, None, "merged", fallback=unfused)


def bare_unsupported_reason(strategy: str, model: Backbone) -> str | None:
    """The reason why the megakernel cannot run the bare backbone of a merging backend, which is logged; or None."""
    reason = default_unsupported_reason(model)
    if reason is not None:
        log.log(dispatch_log_level(), "decoding %s unfused: the megakernel cannot run, as %s", strategy, reason)
    return reason
