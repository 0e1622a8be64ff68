"""The accuracy study of pre-gated experts, in steps that can be killed and started again.

    python -m studies.accuracy --prepare --model DIR --data DIR --mixture mixture.npz
    python -m studies.accuracy --model DIR --mixture mixture.npz --runs DIR [--arms ARM ...] [--budget-seconds N]
    python -m studies.accuracy --merge --runs DIR
    python -m studies.accuracy --report

The first needs the data files and a tokenizer, and may run on another machine than the second. `--stage seeds` trains arms
at the best learning rate of their grids, `--stage bare` scores the backbone. With `--programs` pass@1 is a measure too, and
the records are others. The test questions are another mixture file (--prepare --split test), whose records need a --record
and --runs of their own; their learning rates come from the validation's: --stage seeds --grids FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import write_text
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.fields import require
from benchmarks.common.timing import Stopwatch
from studies.accuracy import pictures
from studies.accuracy.arms import ARMS
from studies.accuracy.mixture import prepare
from studies.accuracy.report import report
from studies.accuracy.study import Plan, Study, bare, grid, of_seeds
from studies.accuracy.tasks import SPLITS
from studies.runs import Runs, add_flags, merge, read_records

USUAL = Plan()
RESULTS = Path("studies/results/nvidia_h200")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = add_flags(parser, RESULTS / "accuracy_runs.jsonl.gz")
    action.add_argument("--prepare", action="store_true", help="write the mixture file")
    parser.add_argument("--model", help="directory of a Hugging Face model")
    parser.add_argument("--data", type=Path, help="folder of the data files that tasks.py names")
    parser.add_argument("--mixture", type=Path, help="the mixture file")
    parser.add_argument(
        "--split", default="validation", choices=SPLITS[1:], help="questions that are scored (--prepare)"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row (--prepare)")
    parser.add_argument("--limit", type=int, help="examples of each set and split, at most (--prepare, to try it)")
    parser.add_argument("--grids", type=Path, help="record of the grids that --stage seeds chooses by, if another")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.md", help="file of the tables (--report)")
    parser.add_argument("--stage", default="grid", choices=["bare", "grid", "seeds"])
    parser.add_argument("--programs", action="store_true", help="measure pass@1 too, in a record of its own")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2.5e-4, 5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of --stage seeds")
    parser.add_argument("--steps", type=int, default=USUAL.steps)
    parser.add_argument("--batch-size", type=int, default=USUAL.batch_size, help="packed rows per replica and step")
    parser.add_argument(
        "--new-tokens", type=int, default=USUAL.new_tokens, help="of a decoded answer to gsm8k, at most"
    )
    parser.add_argument("--dtype", default=USUAL.dtype, choices=["bfloat16", "float32"])
    parser.add_argument("--budget-seconds", type=float, help="start no run that may end later")
    arguments = parser.parse_args(argv)
    for name in ("length", "limit", "steps", "batch_size", "new_tokens"):
        value = getattr(arguments, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    needed: tuple[str, ...] = ("model", "mixture", "runs")
    if arguments.prepare:
        needed = ("model", "data", "mixture")
    elif arguments.report or arguments.merge:
        needed = ("runs",) if arguments.merge else ()
    for name in needed:
        require(getattr(arguments, name) is not None, f"--{name} is missing; give it")
    return arguments


def main(argv: Sequence[str]) -> int:
    watch = Stopwatch()
    arguments = parse(argv)
    if arguments.prepare:
        contents = prepare(
            arguments.model, arguments.data, arguments.mixture,
            length=arguments.length, split=arguments.split, limit=arguments.limit,
        )  # fmt: skip
        print(json.dumps(contents))
        return 0
    recorded = Runs(arguments.record, arguments.runs)
    if arguments.merge:
        merge(recorded)
        return 0
    if arguments.report:
        require(bool(recorded.all), f"--record {arguments.record}: no run is there; run the study first")
        write_text(arguments.out, report(recorded.all))
        print(arguments.out, *pictures.draw(recorded.all, arguments.out), sep="\n")
        return 0
    runtime.set_up()
    plan = Plan(
        steps=arguments.steps, batch_size=arguments.batch_size, dtype=arguments.dtype, new_tokens=arguments.new_tokens
    )
    command = "python -m studies.accuracy " + " ".join(argv)
    study = Study(arguments.model, arguments.mixture, recorded, plan, programs=arguments.programs, command=command)
    if arguments.stage == "bare":
        runs = [bare("lora-32")]
    elif arguments.stage == "grid":
        runs = [grid(arm, arguments.learning_rates) for arm in arguments.arms]
    else:
        grids = study.records if arguments.grids is None else read_records(arguments.grids)
        runs = [of_seeds(arm, arguments.seeds, grids) for arm in arguments.arms]
    print(f"[{watch.seconds:5.0f} s] {len(study.records)} runs are recorded", file=sys.stderr, flush=True)
    study.do_all(runs, budget_seconds=arguments.budget_seconds, watch=watch)
    return 0


if __name__ == "__main__":
    run_cli(main)
