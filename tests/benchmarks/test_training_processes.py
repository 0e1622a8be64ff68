"""benchmarks.training.processes: what is run again by a later call, and two real runs that are compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import processes
from benchmarks.training.processes import REFERENCE, Plan, Run

STEPS = 21


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A call with scenarios that answer with `answers`; it returns the exit code and the checks that were run."""
    monkeypatch.setattr(processes, "prepare", lambda arguments: None)

    def run(answers: dict[tuple[str, ...], tuple[bool, ...]], *flags: str) -> tuple[int, list[str]]:
        begun: list[str] = []

        def scenario(names: tuple[str, ...], of_names: tuple[bool, ...]) -> Any:
            def checks(plan: Plan) -> Any:
                assert names == (REFERENCE,) or plan.losses == [2.0] * STEPS
                begun.extend(names)
                yield from ((is_good, {"losses": [2.0] * (STEPS if is_good else 3)}) for is_good in of_names)

            return checks

        scenarios = {names: scenario(names, of_names) for names, of_names in answers.items()}
        out = ["--devices=4", f"--steps={STEPS}", f"--work={tmp_path / 'work'}", f"--out={tmp_path}", *flags]
        return processes.main(out, scenarios), begun

    return run


def test_what_a_call_leaves_to_the_next(call: Any):
    """A scenario of which one check failed is run again; one that passed is not, but with other steps."""
    first = {(REFERENCE,): (True,), ("a", "b"): (True, False), ("c",): (True,)}
    assert call(first, "--seconds=0") == (1, [])
    assert call(first) == (1, [REFERENCE, "a", "b", "c"])
    assert call(first | {("a", "b"): (True, True)}) == (0, ["a", "b"])
    assert call(first) == (0, [])
    assert call(first, "--steps=22", "--seconds=0") == (1, [])


def test_nothing_is_compared_without_losses(call: Any):
    assert call({(REFERENCE,): (False,), ("a",): (True,)}) == (1, [REFERENCE])


@pytest.mark.parametrize(
    ("code", "change", "is_good"), [(0, 0.0, True), (0, 0.1, False), (1, 0.0, False), (0, None, False)]
)
def test_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, change: float | None, is_good: bool
):
    """A good end has all losses of one process; None: it has too few."""
    plan = Plan(tmp_path, 3, [range(2)], [range(1), range(1, 2)], [3.0, 2.0, 1.0])
    run = plan.run("x")
    run.path.mkdir()
    losses = [3.0, 2.0] if change is None else [3.0, 2.0 + change, 1.0]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    monkeypatch.setattr(Run, "finish", lambda self: [(0, ""), (code, "")])
    assert plan.ended(run)[0] is is_good


def test_devices_of_a_process(monkeypatch: pytest.MonkeyPatch):
    """The second half of those that are visible."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert processes.with_devices(range(2, 4))["CUDA_VISIBLE_DEVICES"] == "6,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert processes.with_devices(range(2, 4)) == os.environ | {"CUDA_VISIBLE_DEVICES": "2,3"}
