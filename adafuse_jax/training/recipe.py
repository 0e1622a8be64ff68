"""What experts and routers do in the first part of a run, so that an expert keeps what it learns.

A router that sees the token alone has a small input in Llama-like models, whose first norm has small weights. So its logits
lie close together, and the balance loss cannot be met, as a frequent token belongs to an expert as a whole: it goes on
moving the most frequent tokens from expert to expert. A router that has *settled* stays as it is after a share of the steps.

*Tied* experts begin with one A and move by Σ_e ∇_e / √E. As the gates sum to 1 and Adam takes no notice of a gradient's
scale, they are one LoRA of their rank, its global norm included, until they are let go; the router learns balance alone
until then. The scale matters when they are let go: Adam's second moments must fit the gradients that an expert then has.
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
from jaxtyping import Array, Int

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.adapters.router import is_router
from adafuse_jax.core.errors import UserError
from adafuse_jax.training.config import TrainConfig


def require_recipe(config: TrainConfig, adapter: AdapterConfig) -> None:
    """Raises `UserError` if a share is asked for that the adapter has no use for."""
    if config.tied_share > 0 and adapter.adapter != "adafuse":
        raise UserError(
            f"--tied-share {config.tied_share}: is for --adapter adafuse, this is {adapter.adapter}; leave it out"
        )
    if config.tied_share > 0 and not adapter.renormalize:
        raise UserError(
            f"--tied-share {config.tied_share}: tied experts are one LoRA only if the gates sum to 1; leave out "
            "--no-renormalize, or this"
        )
    if config.router_share < 1 and adapter.adapter in ("lora", "full", "none"):
        raise UserError(f"--router-share {config.router_share}: {adapter.adapter} has no router; leave it out")


def _over_experts(merge: Callable[[Array], Array], tree: Any) -> Any:
    """With merge([L, E, …]) → [L, 1, …] in the place of every expert's A and B."""

    def of(node: Any) -> Any:
        if not isinstance(node, LoRAExperts):
            return node
        return jax.tree.map(lambda leaf: jnp.broadcast_to(merge(leaf), leaf.shape), node)

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, LoRAExperts))


def tied_gradients(gradients: Any) -> Any:
    """Σ_e ∇_e / √E for every expert."""
    return _over_experts(lambda leaf: leaf.sum(1, keepdims=True) * leaf.shape[1] ** -0.5, gradients)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How many of a run's first steps experts are tied for, and routers learn in. None: for no step, and in all of them."""

    tied: Any = None
    routers: Any = None

    @classmethod
    def of(cls, tied_share: float, router_share: float, steps: int) -> Recipe:
        """Of a run of so many steps; a share of them is rounded up."""

        def first(share: float) -> Any:
            return np.int32(math.ceil(round(share * steps, 6)))

        return cls(
            tied=None if tied_share == 0 else first(tied_share),
            routers=None if router_share == 1 else first(router_share),
        )

    def start(self, adapter: Any) -> Any:
        """What a run begins with: if experts will be tied, the first one in the place of all."""
        return adapter if self.tied is None else _over_experts(lambda leaf: leaf[:, :1], adapter)

    def gradients(self, gradients: Any, step: Int[Array, ""]) -> Any:
        """What is clipped: in the gradients' place, those of tied experts. A settled router's count, though it stays."""
        if self.tied is None:
            return gradients
        return jax.tree.map(partial(jnp.where, step < self.tied), tied_gradients(gradients), gradients)

    def updates(self, updates: Any, step: Int[Array, ""]) -> Any:
        """What is added to the parameters."""
        if self.routers is None:
            return updates
        stays = step >= self.routers
        return jax.tree_util.tree_map_with_path(
            lambda path, update: jnp.where(stays, 0, update) if is_router(path) else update, updates
        )
