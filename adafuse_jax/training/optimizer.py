"""AdamW on clipped gradients: θ ← θ − η(t) · (Adam(clip(∇)) + weight_decay · θ), η(t) of `schedules`."""

from __future__ import annotations

import jax
import optax
from jaxtyping import Array

from adafuse_jax.adapters.router import is_router
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.schedules import learning_rate


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; weight decay spares routers, norms and biases."""

    def decays(path: tuple, _: Array) -> bool:
        return not (is_router(path) or any(word in jax.tree_util.keystr(path) for word in ("norm", "bias")))

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda trained: jax.tree_util.tree_map_with_path(decays, trained),
        ),
    )
