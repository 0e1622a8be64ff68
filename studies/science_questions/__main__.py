"""Fine-tuning with every method on ScienceQA, OpenBookQA and ARC-Easy, alone and mixed: test accuracy, parameters, time.

    python -m studies.science_questions --model SMOLLM2_DIR --data DIR --runs DIR --out OUT [--budget-seconds N]
    python -m studies.science_questions --merge --runs DIR
    python -m studies.science_questions --report

The first does the runs (study.py lists them) that are neither in --record nor in --runs: kill it, or give it a budget, and
start it again. It writes the report after every stage. Keep JAX's compilation cache between calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adafuse_jax.core import runtime
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.fields import require
from benchmarks.common.timing import Stopwatch
from studies.questions import SETS
from studies.runs import Runs, add_flags, merge
from studies.science_questions import report
from studies.science_questions.methods import ABLATIONS, METHODS, RATE_SCALE
from studies.science_questions.report import NAME
from studies.science_questions.study import Study

RESULTS = Path("studies/results/nvidia_h200")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, RESULTS / f"{NAME}_runs.jsonl.gz")
    parser.add_argument("--model", help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="folder of the data files that studies/questions.py names")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for {NAME}.json, .md and .png")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--ablations", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS), metavar="ABLATION")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help=f"times {RATE_SCALE}"
    )
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=8, help="packed rows per replica and step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--replicas", type=int, default=3, help="runs trained together")
    parser.add_argument("--limit", type=int, help="questions of each split, at most (to try the script)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compile-threads", type=int, default=4, help="programs compiled ahead at a time")
    parser.add_argument("--budget-seconds", type=float, help="start no run after so long")
    arguments = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "length", "replicas", "limit", "compile_threads"):
        value = getattr(arguments, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    needed = ("runs",) if arguments.merge else () if arguments.report else ("model", "data", "runs")
    for name in needed:
        require(getattr(arguments, name) is not None, f"--{name} is missing; give it")
    return arguments


def main(argv: Sequence[str]) -> int:
    watch = Stopwatch()
    arguments = parse(argv)
    runs = Runs(arguments.record, arguments.runs)
    if arguments.merge:
        merge(runs)
        return 0
    if arguments.report:
        require(bool(runs.all), f"--record {arguments.record}: no run is there; run the study first")
        report.write(runs.all, arguments.out)
        return 0
    runtime.set_up()
    study = Study(arguments, runs, command=f"python -m studies.{NAME} " + " ".join(argv))
    stage = ""
    for run in study.plan():
        if run.name in runs.all:
            continue
        if run.stage != stage:
            stage = run.stage
            study.compile_ahead(stage)
            report.write(runs.all, arguments.out)
        elapsed = watch.seconds
        if arguments.budget_seconds is not None and elapsed > arguments.budget_seconds:
            print(f"{elapsed:.0f} s are over the budget; {run.name} is next", file=sys.stderr)
            break
        record = study.do(run)
        found = [next(iter(replica.values())) for replica in record["replicas"]]
        print(f"[{watch.seconds:6.0f} s] {run.name}: {found}, {record['wall_seconds']:.1f} s", file=sys.stderr)
    study.close()
    report.write(runs.all, arguments.out)
    print((arguments.out / f"{NAME}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    run_cli(main)
