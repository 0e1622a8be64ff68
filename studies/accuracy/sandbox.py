"""Untrusted Python programs, each run in a process of its own that can do no harm, and judged by this process.

    here: program, function, calls → child: isolate, run, call → JSON results → here: compare with the expected ones

`sandbox_child` refuses every file, process and socket. The expected results stay here, so that a program cannot pass by
reading them, by ending early or by redefining equality. Outcomes:

    passed   every result is right
    wrong    a result is not
    error    no program, no such function, or an exception
    stopped  too much time, memory or output
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adafuse_jax.core.errors import UserError

Outcome = Literal["passed", "wrong", "error", "stopped"]
CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS, WALL_SECONDS, BYTES = 2, 20, 512 << 20
"""Limits of a program: processor time, time, address space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A program, and what its function returns for each list of arguments, all as JSON has it."""

    program: str
    function: str
    calls: Sequence[Sequence[Any]]
    results: Sequence[Any]


def judge_all(jobs: Sequence[Job]) -> list[Outcome]:
    """Outcome of every job, as many at once as there are processors; equal programs for a function run once. Raises
    `UserError` if this machine cannot isolate."""
    different = list({(job.program, job.function): job for job in jobs}.items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = dict(zip((key for key, _ in different), pool.map(judge, (job for _, job in different)), strict=True))
    return [outcomes[job.program, job.function] for job in jobs]


def judge(job: Job) -> Outcome:
    """Run a program and compare its results. Raises `UserError` if this machine cannot isolate it."""
    request = {"program": job.program, "function": job.function, "calls": job.calls, "seconds": SECONDS, "bytes": BYTES}
    with tempfile.TemporaryDirectory() as folder:
        asked, written, failed = (Path(folder, name) for name in ("job", "results", "errors"))
        asked.write_text(json.dumps(request))
        with asked.open("rb") as job_file, written.open("wb") as results, failed.open("wb") as errors:
            child = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", str(CHILD)],
                stdin=job_file, stdout=results, stderr=errors, cwd=folder, start_new_session=True,
                env={"PYTHONHASHSEED": "0"},
            )  # fmt: skip
            try:
                child.wait(WALL_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        isolated, _, found = written.read_bytes().partition(b"\n")
        reason = (failed.read_text(errors="replace").split("\n")[-2:] or [""])[0] or f"exit code {child.returncode}"
    if isolated != b"isolated":
        raise UserError(
            f"programs cannot be isolated on this machine ({reason[:120]}); use Linux on x86-64 or ARM64 with seccomp"
        )
    if child.returncode:
        return "stopped"
    try:
        answer = json.loads(found)
    except (ValueError, RecursionError):
        return "stopped"
    if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
        return "stopped" if isinstance(answer, dict) and answer.get("error") == "MemoryError" else "error"
    return "passed" if same(answer["results"], list(job.results)) else "wrong"


def same(found: Any, expected: Any) -> bool:
    """Equality of JSON values: a truth value is no number, and numbers are equal to within a millionth."""
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return type(found) is type(expected) and found == expected
    if isinstance(expected, int | float):
        if not isinstance(found, int | float) or isinstance(found, bool):
            return False
        exact = isinstance(found, int) and isinstance(expected, int)  # which may be too large for a float
        return found == expected if exact else math.isclose(_float(found), expected, rel_tol=1e-6, abs_tol=1e-9)
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same, found, expected))
    return (
        isinstance(found, dict)
        and found.keys() == expected.keys()
        and all(same(found[k], expected[k]) for k in expected)
    )


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
