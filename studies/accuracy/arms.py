"""The arms of the study: name → settings of its adapter, on all 7 linears unless given otherwise.

A mixture gives a token rank 32 of 128 in all: k = 2 of E = 8 experts of rank 16, or as given below. So LoRA comes
with rank 32, which costs as much at decoding, and with 128, which has as many parameters. MoRAL adapts the FFN alone, and
MoLA has 2/4/6/8 experts by depth: both are smaller in all. The scale is s = α/R = 2; rsLoRA's is s = α/√R, 2 at rank 16.

    adafuse          as the paper
    adafuse-late     the best recipe of the first study: one of 4 experts of rank 32 a token; tied for 3/4 of the steps, its
                     router frozen after 1/10
    adafuse-normed   router: input normalised, own learning rate, balance by a selection bias. All below have this router
    adafuse-shared   a shared expert of rank 16, and 2 of 14 experts of rank 8
    adafuse-fine     4 of 16 experts of rank 8
    adafuse-shared-fine
                     a shared expert of rank 16, and 4 of 28 experts of rank 4
    adafuse-shared-a one A of rank 21 for all of 11 experts, each with a B of its own
    adafuse-init     orthogonal A, and expert dropout
    adafuse-context  as adafuse-shared; the router also sees the decayed mean of the tokens before
    adafuse-fine-scaled, adafuse-fine-convolved, adafuse-fine-request, adafuse-fine-principal
                     adafuse-fine with one change: s = 2.8, as rsLoRA at rank 8; the router also sees a convolution of
                     4 tokens; or the mean hidden state of the request's prompt; A of the weights' singular vectors
    by-task          a shared expert of rank 16, and one of 8 experts of rank 14 given by the set: what routing could gain
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from adafuse_jax.adapters import registry
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.models.config import FFN_LINEARS, LINEARS, ModelConfig
from adafuse_jax.models.decoder import Backbone
from studies.accuracy.pregated import PreGated, Variant
from studies.accuracy.tasks import SETS
from studies.training import SETTLED, TIED, USUAL

VARIANT = "variant"
"""The setting that makes an adapter of `pregated` instead of one of the product's."""


def _low_rank(adapter: str, rank: int, scale: float = 2.0, **settings: Any) -> dict[str, Any]:
    return {"adapter": adapter, "targets": LINEARS, "dropout": 0.0, "rank": rank, "alpha": scale * rank} | settings


def _mixture(adapter: str, rank: int = 16, **settings: Any) -> dict[str, Any]:
    return _low_rank(adapter, rank, **{"top_k": 2, "balance_coefficient": 0.01} | settings)


def _fine(alpha: float = 16.0, **variant: Any) -> dict[str, Any]:
    return _mixture("adafuse", 8, num_experts=16, top_k=4, alpha=alpha, variant=Variant(**variant))


def _rank_stabilized(rank: int) -> dict[str, Any]:
    return _low_rank("lora", rank, scale=2 * math.sqrt(16 / rank))


ARMS: dict[str, dict[str, Any]] = {
    "lora-32": _low_rank("lora", 32),
    "lora-128": _low_rank("lora", 128),
    "adafuse": _mixture("adafuse", num_experts=8),
    "adafuse-normed": _mixture("adafuse", num_experts=8, variant=Variant()),
    "adafuse-shared": _mixture("adafuse", 8, num_experts=14, variant=Variant(shared_rank=16)),
    "by-task": _mixture("adafuse", 14, num_experts=len(SETS), top_k=1, variant=Variant(shared_rank=16, by_task=True)),
    "mola": _mixture("mola", experts_per_layer=(2, 4, 6, 8)),
    "adafuse-context": _mixture("adafuse", 8, num_experts=14, variant=Variant(shared_rank=16, context_decay=0.98)),
    "moral": _mixture("moral", targets=FFN_LINEARS, num_experts=8),
    "adafuse-init": _mixture("adafuse", num_experts=8, variant=Variant(orthogonal=True, expert_dropout=0.1)),
    "adafuse-fine": _fine(),
    "adafuse-late": _mixture("adafuse", 32, num_experts=4, top_k=1, **{TIED: 0.75, SETTLED: 0.1}),
    "adafuse-shared-fine": _mixture("adafuse", 4, num_experts=28, top_k=4, variant=Variant(shared_rank=16)),
    "adafuse-shared-a": _mixture("adafuse", 21, num_experts=11, variant=Variant(shared_a=True)),
    "rslora-128": _rank_stabilized(128),
    "rslora-32": _rank_stabilized(32),
    "adafuse-fine-scaled": _fine(alpha=8 * 2 * math.sqrt(16 / 8)),
    "adafuse-fine-convolved": _fine(convolution=4),
    "adafuse-fine-request": _fine(by_request=True),
    "adafuse-fine-principal": _fine(principal=True),
}
"""Names of the arms in the order in which a screening trains them."""


def make(settings: dict[str, Any], model: Backbone, key: jax.Array) -> Any:
    """The adapter of an arm, with initial values drawn from `key`."""
    adapter = make_adapter(settings, model.config, key)
    if isinstance(adapter, PreGated):
        adapter.start_from(model)
    return adapter


def make_adapter(settings: dict[str, Any], model: ModelConfig, key: jax.Array) -> Any:
    config = AdapterConfig(**{name: value for name, value in settings.items() if name not in (*USUAL, VARIANT)})
    rngs = nnx.Rngs(params=key)
    if VARIANT in settings:
        return PreGated(config, model, settings[VARIANT], rngs=rngs)
    return registry.make_adapter(config, model, rngs=rngs)


def parameters(settings: dict[str, Any], model: ModelConfig) -> tuple[int, int]:
    """(in all, active for a token): of E experts k are active, a router whole."""
    adapter = jax.eval_shape(lambda: make_adapter(settings, model, jax.random.key(0)))
    nodes = jax.tree.leaves(adapter, is_leaf=lambda node: isinstance(node, LoRAExperts))
    active = 0
    for node in nodes:
        for leaf in jax.tree.leaves(node):
            several = isinstance(node, LoRAExperts) and leaf.shape[1] > 1  # [L, E, …]
            active += math.prod(leaf.shape) * settings["top_k"] // leaf.shape[1] if several else math.prod(leaf.shape)
    return registry.num_parameters(adapter), active


def table(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them."""
    return {name: dataclasses.asdict(v) if isinstance(v, Variant) else v for name, v in settings.items()}


def restored(recorded: dict[str, Any]) -> dict[str, Any]:
    """Settings from `table`'s form; what a variant got later has its default."""

    def of(name: str, value: Any) -> Any:
        return Variant(**value) if name == VARIANT else tuple(value) if isinstance(value, list) else value

    return {name: of(name, value) for name, value in recorded.items()}
