"""Correct first: losses of `train_step` over 20 steps beside PEFT's, from the same weights, LoRA, data and optimiser.

    python -m benchmarks.training.curve --job JOB.json --result RESULT.json     # `benchmarks.training` does

in float32, for every remat policy, scanned and unrolled. `work` of the job has what a job `curve` of
`benchmarks.training.peers` has left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adafuse_jax.checkpoints.adapter_directory import load_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.core import runtime
from adafuse_jax.training.step import TrainState, train_step
from benchmarks.common.jobs import Report, run_as_job
from benchmarks.common.records import facts
from benchmarks.training.rows import constant_rate_optimizer, random_batch
from benchmarks.training.shapes import CURVE_LEARNING_RATE, CURVE_STEPS

FORMS = (
    ("none", False),
    ("products", False),
    ("attention", False),
    ("full", False),
    ("none", True),
    ("products", True),
)


def measure(job: dict[str, Any], report: Report) -> None:
    """`job`: work, batch, length, losses (PEFT's). Reports the largest difference of each form."""
    runtime.exact_float32()
    checkpoint = HFCheckpoint.open(str(Path(job["work"]) / "model"))
    model, optimizer = load_backbone(checkpoint, "float32"), constant_rate_optimizer(CURVE_LEARNING_RATE)
    differences: dict[str, float] = {}
    for remat, unroll in FORMS:
        lora = load_adapter(
            Path(job["work"]) / "lora",
            model.config,
            backbone_identity=checkpoint.identity(),
            dtype=jnp.dtype("float32"),
        )
        state = TrainState(step=jnp.int32(0), adapter=lora, moments=optimizer.init(lora), key=jax.random.key(0))
        off = 0.0
        for step in range(CURVE_STEPS):
            batch = random_batch(model.config.vocab_size, job["batch"], job["length"], 1, step % 4)
            state, metrics = train_step(
                state, model, batch, optimizer=optimizer, remat=remat, unroll=unroll, max_segments=1
            )
            off = max(off, abs(float(metrics["loss"]) - job["losses"][step]))
        differences[f"{remat}, {'unrolled' if unroll else 'scanned'}"] = off
    report({"differences": differences})


def main() -> None:
    run_as_job(__doc__, measure, facts)


if __name__ == "__main__":
    main()
