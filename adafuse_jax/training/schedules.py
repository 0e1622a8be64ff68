"""Schedules over steps: the learning rate, and the phases of expert weight tying and router freezing.

A router that sees the token alone has a small input in Llama-like models, whose first norm has small weights. So its logits
lie close together, and the balance loss cannot be met, as a frequent token belongs to an expert as a whole: it goes on
moving the most frequent tokens from expert to expert, and a token that changes experts loses what they had learned for it.
*Router freezing* stops the routers after a share of the steps.

*Expert weight tying* starts all experts with one A and moves them by Σ_e ∇_e / √E. As the gates sum to 1 and Adam is
invariant to a gradient's scale, tied experts are one LoRA of their rank, its global norm included; the router learns from
the balance loss alone. The scale matters once they are untied: Adam's second moments must fit the gradients of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.adapters.router import is_router
from adafuse_jax.training.config import TrainConfig


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over the first share of the steps, then a cosine to `min_lr_ratio` of the peak."""
    warmup = math.ceil(config.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.min_lr_ratio * config.learning_rate,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """The first steps of a run in which experts are tied, and those in which routers learn. None: no step, and all steps."""

    tied_steps: Any = None
    router_steps: Any = None

    @classmethod
    def of(cls, tied_share: float, router_share: float, steps: int) -> Phases:
        """Phases of a run of `steps` steps; the shares of the steps are rounded up."""

        def first(share: float) -> Any:
            return np.int32(math.ceil(round(share * steps, 6)))

        return cls(
            tied_steps=None if tied_share == 0 else first(tied_share),
            router_steps=None if router_share == 1 else first(router_share),
        )

    def initial(self, adapter: Any) -> Any:
        """The adapter at step 0: if its experts are tied, the first one in the place of all."""
        return adapter if self.tied_steps is None else _over_experts(lambda leaf: leaf[:, :1], adapter)

    def gradients(self, gradients: Any, step: Int[Array, ""]) -> Any:
        """Gradients to clip: those of tied experts in their phase. A frozen router's count, though it stays."""
        if self.tied_steps is None:
            return gradients
        return jax.tree.map(partial(jnp.where, step < self.tied_steps), tied_gradients(gradients), gradients)

    def updates(self, updates: Any, step: Int[Array, ""]) -> Any:
        """Updates to add to the parameters: none for a frozen router."""
        if self.router_steps is None:
            return updates
        frozen = step >= self.router_steps
        return jax.tree_util.tree_map_with_path(
            lambda path, update: jnp.where(frozen, 0, update) if is_router(path) else update, updates
        )


def tied_gradients(gradients: Any) -> Any:
    """Σ_e ∇_e / √E for every expert."""
    return _over_experts(lambda leaf: leaf.sum(1, keepdims=True) * leaf.shape[1] ** -0.5, gradients)


def _over_experts(reduce: Callable[[Array], Array], tree: Any) -> Any:
    """`tree` with reduce([L, E, …]) → [L, 1, …] in the place of every expert's A and B."""

    def of(node: Any) -> Any:
        if not isinstance(node, LoRAExperts):
            return node
        return jax.tree.map(lambda leaf: jnp.broadcast_to(reduce(leaf), leaf.shape), node)

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, LoRAExperts))
