"""Fine-tune SmolLM2-135M-Instruct on OpenBookQA: test accuracy of the bare backbone and after AdaFuse.

    python -m benchmarks.training.openbookqa --model SMOLLM2_DIR --train TRAIN_FILE --test TEST_FILE --work /tmp/obqa \
        --out benchmarks/results/nvidia_h200

The learning rate is the best of a small grid on a tenth of the training set, held out. The test set is scored in the
final run before the first step (B = 0, so the adapted model is the backbone) and after the last; in between for the
curve only. Speed and memory are those of the first seed, which runs alone; the other runs share the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common.timing import Stopwatch


def train(arguments: list[str], share: float = 1.0) -> dict[str, Any]:
    """Run train.py with a share of the GPU's memory; its summary."""
    print("$ python train.py", " ".join(arguments), flush=True)
    watch = Stopwatch()
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(round(0.9 * share, 3))}
    command = [sys.executable, "train.py", *arguments]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    summary = json.loads(result.stdout)
    print(f"  {watch.seconds:.0f} s, before {summary['before']}, after {summary['after']}", flush=True)
    return summary


def train_together(runs: list[list[str]]) -> list[dict[str, Any]]:
    """Several runs at a time on one GPU: quick, but their speed is no measurement."""
    with ThreadPoolExecutor(len(runs) or 1) as pool:
        return list(pool.map(lambda arguments: train(arguments, share=1 / len(runs)), runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--train", required=True, help="training questions, 4957 rows")
    parser.add_argument("--test", required=True, help="test questions, 500 rows")
    parser.add_argument("--work", type=Path, required=True, help="new directory for the runs")
    parser.add_argument("--out", type=Path, required=True, help="directory for openbookqa.json and the picture")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-flags", default="", help="more flags of train.py, as one string")
    arguments = parser.parse_args()

    common = [
        "--model", arguments.model, "--dataset", arguments.train, "--targets", "all", "--num-experts", "8", "--rank", "16",
        "--alpha", "32", "--top-k", "2", "--epochs", "4", "--batch-size", "16", "--max-length", "512", "--dtype", "bfloat16",
        "--remat", "none", "--eval-examples", "500", "--checkpoint-every", "1000000",
        "--keep-checkpoints", "1", *arguments.train_flags.split(),
    ]  # fmt: skip
    rates = arguments.learning_rates
    trials = [
        [*common, "--eval-fraction", "0.1", "--learning-rate", str(lr), "--output", str(arguments.work / f"grid-{lr}")]
        for lr in rates
    ]
    grid = {lr: summary["after"] for lr, summary in zip(rates, train_together(trials), strict=True)}
    best = max(grid, key=lambda lr: grid[lr]["accuracy"])
    print(f"learning rate {best}")

    def final(seed: int) -> list[str]:
        output = ["--seed", str(seed), "--output", str(arguments.work / f"final-{seed}")]
        return [*common, "--eval-dataset", arguments.test, "--learning-rate", str(best), "--eval-every", "64", *output]

    first, *others = arguments.seeds
    summaries = [train(final(first)), *train_together([final(seed) for seed in others])]
    runs = [{"seed": seed, **summary} for seed, summary in zip(arguments.seeds, summaries, strict=True)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.work / f"final-{first}" / "training.png", arguments.out / "openbookqa.png")
    shutil.copyfile(arguments.work / f"final-{first}" / "metrics.jsonl", arguments.out / "openbookqa_metrics.jsonl")
    result = {
        "command": "python -m benchmarks.training.openbookqa " + " ".join(sys.argv[1:]),
        "final_command": "python train.py " + " ".join(final(first)),
        "train_flags": " ".join(common[2:]),
        "grid_on_held_out_training_questions": {str(lr): value for lr, value in grid.items()},
        "learning_rate": best,
        "test_accuracy_backbone": runs[0]["before"]["accuracy"],
        "test_accuracy_adafuse": [run["after"]["accuracy"] for run in runs],
        "tokens_per_second": runs[0]["median_tokens_per_second"],
        "peak_device_gib": runs[0]["peak_device_gib"],
        "runs": runs,
    }
    (arguments.out / "openbookqa.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
