"""Measurements in processes of their own: memory and compilation of one job do not disturb another.

    python -m MODULE --job JOB.json --result RESULT.json

A job writes what it has found so far after each row: what a process that is stopped has measured is not lost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.records import MAX_ERROR
from benchmarks.common.timing import Stopwatch

LEAST_SECONDS = 30
"""Time that a job needs to begin at all."""
Report = Callable[[dict[str, Any]], None]
"""Called by a job with all that it has found so far."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process: `settings` go to it, `rows` are the keys of the rows that it is to measure."""

    name: str
    module: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_job(job: Job, common: dict[str, Any], timeout: float, python: str) -> tuple[dict[str, Any], str | None]:
    """The results that the process reported until it ended, and the last line of its error. `timeout` in seconds."""
    print(f"{job.name}:", flush=True)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        order, result, log = (Path(scratch) / name for name in ("job.json", "result.json", "stderr"))
        order.write_text(json.dumps(common | job.settings))
        command = [python, "-m", job.module, "--job", str(order), "--result", str(result)]
        problem = None
        with log.open("w") as errors:
            try:
                whole = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # or the last line is a remark about the filter
                done = subprocess.run(command, stderr=errors, timeout=timeout, env=whole)
                if done.returncode:
                    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                    problem = (lines or [f"exit code {done.returncode}"])[-1][:MAX_ERROR]
                    print("\n".join(lines[-30:]), flush=True)
            except subprocess.TimeoutExpired:
                problem = f"stopped after {timeout:.0f} s"
        found = json.loads(result.read_text()) if result.exists() else {}
    print(f"  {watch.seconds:.0f} s{f', {problem}' if problem else ''}", flush=True)
    return found, problem


def run_job_within(
    left: float, job: Job, common: dict[str, Any], timeout: float, python: str
) -> tuple[dict[str, Any], str | None] | None:
    """The answer of `run_job` in a call that has `left` seconds; None if they are too few, and the next call has the job."""
    if left < LEAST_SECONDS:
        print(f"{job.name}: not begun, as the call's time is over; the same command continues", flush=True)
        return None
    found, problem = run_job(job, common, min(timeout, left), python)
    is_cut_short = left < timeout and problem is not None and problem.startswith("stopped after")
    return None if is_cut_short else (found, problem)


def add_job_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--job", type=Path, required=required, help="JSON of the settings")
    parser.add_argument("--result", type=Path, required=required, help="JSON file to write")


def reporter(result: Path, facts: dict[str, Any]) -> Report:
    """Writes what it is called with, and `facts` about the process, to `result`."""

    def report(found: dict[str, Any]) -> None:
        result.write_text(json.dumps(facts | found))

    return report


def run_as_job(
    description: str | None, measure: Callable[[dict[str, Any], Report], None], facts: Callable[[], dict[str, Any]]
) -> None:
    """The main function of a job's module: parse its flags, and measure what the file of settings says. `facts` are called
    for after the flags are parsed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_flags(parser)
    arguments = parser.parse_args()
    measure(json.loads(arguments.job.read_text()), reporter(arguments.result, facts()))
