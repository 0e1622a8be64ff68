"""Fine-tune SmolLM2-135M-Instruct on OpenBookQA: test accuracy of the bare backbone and after AdaFuse.

    python -m benchmarks.training.openbookqa --model SMOLLM2_DIR --train TRAIN_FILE --test TEST_FILE --work /tmp/obqa \
        --out benchmarks/results/nvidia_h200
    python -m benchmarks.training.openbookqa … --learning-rates 1e-3 --quantize none int8 int4-g64 --together

The learning rate is the best of a small grid on a tenth of the training set, held out; one that is given alone is taken.
The test set is scored in the final run before the first step (B = 0, so the adapted model is the backbone) and after the
last; in between for the curve only. Speed and memory are those of the first seed, which runs alone; the other runs share
the GPU. Quantised backbones train with the same seeds and learning rate as the plain one; their record is
`openbookqa_quantised.json`. With `--together` all runs share the GPU, and no speed is recorded. A run that is done is not
done again: start the command again after it was ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adafuse_jax.models.quantised import LAYOUTS
from adafuse_jax.training.output import CONFIG_FILE, SUMMARY_FILE
from benchmarks.common.records import command_line, commit, write_json
from benchmarks.common.timing import Stopwatch

CURVE = ("--eval-every", "64")
"""Flags of the first run alone, which change no result."""


def train(arguments: list[str], share: float = 1.0) -> dict[str, Any]:
    """Run train.py with a share of the GPU's memory; its summary. A run that has one is done. Raises `SystemExit` for a run
    that has begun with other flags."""
    output = Path(arguments[arguments.index("--output") + 1])
    flags = [flag for flag in arguments if flag not in CURVE]
    begun = output.parent / f"{output.name}.json"
    if begun.exists() and json.loads(begun.read_text()) != flags:
        raise SystemExit(f"{output} has begun with other flags, see {begun}; give another --work")
    write_json(begun, flags)
    if (output / SUMMARY_FILE).exists():
        return json.loads((output / SUMMARY_FILE).read_text())
    arguments = [*arguments, *(["--resume"] if (output / CONFIG_FILE).exists() else [])]
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


def mean_and_deviation(values: list[float]) -> list[float]:
    """[mean, standard deviation] of the seeds' accuracies."""
    return [round(statistics.mean(values), 4), round(statistics.stdev(values), 4) if len(values) > 1 else 0.0]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--train", required=True, help="training questions, 4957 rows")
    parser.add_argument("--test", required=True, help="test questions, 500 rows")
    parser.add_argument("--work", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--out", type=Path, required=True, help="directory for the record and the picture")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quantize", nargs="+", choices=("none", *LAYOUTS), default=["none"], help="the backbones")
    parser.add_argument("--together", action="store_true", help="all final runs at a time")
    parser.add_argument("--train-flags", default="", help="more flags of train.py, as one string")
    arguments = parser.parse_args(argv)
    rates, work, backbones = arguments.learning_rates, arguments.work, arguments.quantize

    common = [
        "--model", arguments.model, "--dataset", arguments.train, "--targets", "all", "--num-experts", "8", "--rank", "16",
        "--alpha", "32", "--top-k", "2", "--epochs", "4", "--batch-size", "16", "--max-length", "512", "--dtype", "bfloat16",
        "--remat", "none", "--eval-examples", "500", "--checkpoint-every", "1000000",
        "--keep-checkpoints", "1", *arguments.train_flags.split(),
    ]  # fmt: skip
    best, grid = rates[0], {}
    if len(rates) > 1:
        held_out = [*common, "--eval-fraction", "0.1"]
        trials = [[*held_out, "--learning-rate", str(lr), "--output", str(work / f"grid-{lr}")] for lr in rates]
        grid = {lr: summary["after"] for lr, summary in zip(rates, train_together(trials), strict=True)}
        best = max(grid, key=lambda lr: grid[lr]["accuracy"])
        print(f"learning rate {best}")

    def final(backbone: str, seed: int) -> list[str]:
        name = f"final-{seed}" if backbone == "none" else f"final-{backbone}-{seed}"
        flags = [] if backbone == "none" else ["--quantize", backbone]
        flags += CURVE if (backbone, seed) == cases[0] else []
        output = ["--seed", str(seed), "--output", str(work / name)]
        return [*common, "--eval-dataset", arguments.test, "--learning-rate", str(best), *flags, *output]

    cases = [(backbone, seed) for backbone in backbones for seed in arguments.seeds]
    alone = [] if arguments.together else [train(final(*cases[0]))]
    summaries = [*alone, *train_together([final(*case) for case in cases[len(alone) :]])]
    runs = [{"quantize": q, "seed": n, **summary} for (q, n), summary in zip(cases, summaries, strict=True)]
    accuracies = {name: [run["after"]["accuracy"] for run in runs if run["quantize"] == name] for name in backbones}
    speed = {} if arguments.together else {
        "tokens_per_second": runs[0]["median_tokens_per_second"], "peak_device_gib": runs[0]["peak_device_gib"],
    }  # fmt: skip
    result = {
        "command": command_line("benchmarks.training.openbookqa", argv),
        "commit": commit(),
        "final_command": "python train.py " + " ".join(final(*cases[0])),
        "train_flags": " ".join(common[2:]),
        "grid_on_held_out_training_questions": {str(lr): value for lr, value in grid.items()},
        "learning_rate": best,
        "test_accuracy_backbone": {
            name: next(run["before"]["accuracy"] for run in runs if run["quantize"] == name) for name in backbones
        },
        "test_accuracy_adafuse": accuracies,
        "mean_and_deviation": {name: mean_and_deviation(values) for name, values in accuracies.items()},
        **speed,
        "runs": runs,
    }
    stem = "openbookqa" if backbones == ["none"] else "openbookqa_quantised"
    write_json(arguments.out / f"{stem}.json", result)
    first = Path(final(*cases[0])[-1])
    if (first / "training.png").exists():
        shutil.copyfile(first / "training.png", arguments.out / f"{stem}.png")
    shutil.copyfile(first / "metrics.jsonl", arguments.out / f"{stem}_metrics.jsonl")
    print(json.dumps({name: result[name] for name in ("test_accuracy_backbone", "mean_and_deviation")}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
