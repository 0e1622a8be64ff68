"""Training runs of a tiny model: their folder, flags, metrics and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.training import trainer
from adafuse_jax.training.config import TrainConfig

STEPS, CHECKPOINT_EVERY = 120, 3


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("resume"))


def flags(run_folder: Path, output: str, **changes: Any) -> list[str]:
    """A run in which everything random matters: dropout, two micro-batches, a weighted mixture, a held-out part; and in
    which experts are untied and routers freeze on the way."""
    settings = {
        "steps": STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "dropout": 0.1,
        "grad_accum": 2,
        "dataset": [f"{run_folder}/alpha.jsonl=2", f"{run_folder}/beta.jsonl=1"],
        "eval_examples": 4,
        "eval_every": 25,
        "warmup_ratio": 0.1,
        "tied_share": 0.3,
        "router_share": 0.6,
    }
    return tiny.train_flags(run_folder, output, **(settings | changes))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics without the one value that depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def saved_state(run: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name, read without the package."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(run / "checkpoints" / str(step) / "state")


def train_here(run_folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    config, adapter_config = parse_flags("", (TrainConfig, AdapterConfig), flags(run_folder, str(output), **changes))
    return trainer.train(config, adapter_config)  # type: ignore[arg-type]
