"""`--adapter none`: the held-out numbers of the bare backbone, without a step of training."""

from __future__ import annotations

import logging
from typing import Any

import jax

from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.prepare import Data

log = logging.getLogger(__name__)


def require_evaluation(config: TrainConfig) -> None:
    """Raise `UserError` for what makes no sense without training."""
    if config.resume:
        raise UserError("--adapter none trains nothing that --resume could continue; leave one of them out")
    if config.eval_examples == 0:
        raise UserError("--adapter none only evaluates, and --eval-examples 0 leaves nothing to do; raise it")


def evaluate_only(config: TrainConfig, model: Backbone, data: Data) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line of metrics, and a summary whose `before` and `after` are the same."""
    log.info("--adapter none: no training; these are the held-out numbers of the bare backbone")
    result = data.held_out.evaluate(model, None, batch_size=config.batch_size)
    if not result:
        raise UserError(
            "--adapter none only evaluates, and no held-out example is left; give other data in --eval-dataset"
        )
    line = {"step": 0, **result}
    return line, {
        "steps": 0,
        "trainable_parameters": 0,
        "before": line,
        "after": line,
        "peak_device_gib": runtime.peak_device_gib(),
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
    }
