"""A run that is killed, stopped or out of disk, and resumed, ends as if nothing had happened: bit for bit on the CPU."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from forked_runs import ForkedRun
from training_runs import CHECKPOINT_EVERY, STEPS, checkpoints_of, flags, metrics_of, saved_state, train_here

pytestmark = pytest.mark.usefixtures("optimised")

KILLS_STARTING, KILLS_STEPPING, KILLS_ENDING = 4, 17, 2


def start(run_folder: Path, output: str, **changes: Any) -> ForkedRun:
    """The run as a process; resumed if there is one."""
    if (run_folder / output / "train_config.json").exists():
        changes["resume"] = True
    return ForkedRun(flags(run_folder, output, **changes), run_folder / "compiled", run_folder / f"{output}.stderr")


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: ForkedRun, condition: Callable[[], bool]) -> None:
    """Return once the condition holds or the process has ended."""
    while process.running and not condition():
        time.sleep(0.002)


def wait_for_steps(process: ForkedRun, run: Path, count: int) -> None:
    """Wait until the process has begun its loop (it replaces the metrics file) and written `count` lines."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else None
    wait_for(process, lambda: metrics.exists() and metrics.stat().st_ino != before)
    present = lines_of(metrics)
    wait_for(process, lambda: lines_of(metrics) >= present + count)


def kill(process: ForkedRun) -> bool:
    """SIGKILL to the whole group; whether it was still running."""
    running = process.running
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    code, stderr = process.finish()
    assert code in (0, -signal.SIGKILL), stderr
    return running


def check_same(run: Path, reference: Path) -> None:
    assert metrics_of(run) == metrics_of(reference)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    summaries = [json.loads((where / "summary.json").read_text()) for where in (run, reference)]
    assert summaries[0]["after"] == summaries[1]["after"]


@pytest.fixture(scope="module")
def uninterrupted(run_folder: Path) -> Path:
    """A run from start to end. Its programs stay in the tests' cache, which runs that are killed see through links: what
    they write themselves may be cut off."""
    environment = tiny.environment(JAX_DISABLE_MOST_OPTIMIZATIONS="False")
    done = tiny.run_script("train", flags(run_folder, "uninterrupted"), env=environment)
    assert done.returncode == 0, done.stderr
    shutil.copytree(jax.config.values["jax_compilation_cache_dir"], run_folder / "compiled", copy_function=os.symlink)
    return run_folder / "uninterrupted"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(run_folder: Path, uninterrupted: Path):
    rng = random.Random(0)
    run = run_folder / "killed"
    begun = time.perf_counter()
    moments = ["starting"] * KILLS_STARTING + ["stepping"] * KILLS_STEPPING
    rng.shuffle(moments)
    kills = 0
    for moment in [*moments, *["ending"] * KILLS_ENDING]:
        process = start(run_folder, "killed")
        if moment == "starting":
            time.sleep(rng.uniform(0, 2))
        elif moment == "stepping":
            wait_for_steps(process, run, rng.randint(0, 8))
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait_for(process, lambda: any(line["step"] == STEPS for line in whole_lines(run)))
            time.sleep(rng.uniform(0, 1))
        kills += kill(process)
    assert kills >= 20, f"{kills} kills in {time.perf_counter() - begun:.0f} s"
    code, stderr = start(run_folder, "killed").finish()
    assert code == 0, stderr
    steps = [line["step"] for line in metrics_of(run) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    check_same(run, uninterrupted)


def whole_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
def test_sigterm_saves(run_folder: Path, uninterrupted: Path):
    run = run_folder / "stopped"
    process = start(run_folder, "stopped")
    wait_for_steps(process, run, 4)
    os.kill(process.pid, signal.SIGTERM)
    code, stderr = process.finish()
    assert code == 143
    step = metrics_of(run)[-1]["step"]
    assert stderr.splitlines()[-1] == f"stopped at step {step} of {STEPS}, which is saved; continue with --resume"
    assert step < STEPS
    assert checkpoints_of(run)[-1] == step
    code, stderr = start(run_folder, "stopped").finish()
    assert code == 0, stderr
    check_same(run, uninterrupted)


@pytest.mark.slow
def test_full_disk_while_training(run_folder: Path, uninterrupted: Path):
    """Files cannot grow any more once a checkpoint is there."""
    run = run_folder / "full"
    process = start(run_folder, "full")
    wait_for(process, lambda: (run / "checkpoints" / "6").exists())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    code, stderr = process.finish()
    line = stderr.splitlines()[-1]
    assert code == 2
    assert "Traceback" not in stderr
    assert line.startswith("error: ")
    assert str(run) in line
    assert line.endswith("free space, then continue with --resume")
    last = checkpoints_of(run)[-1]
    assert all(np.isfinite(array).all() for array in saved_state(run, last).values())
    code, stderr = start(run_folder, "full").finish()
    assert code == 0, stderr
    check_same(run, uninterrupted)


@pytest.mark.slow
def test_last_checkpoints_are_kept(uninterrupted: Path):
    assert checkpoints_of(uninterrupted) == [STEPS - CHECKPOINT_EVERY, STEPS]
    assert sorted(os.listdir(uninterrupted)) == [
        ".lock", "adapter", "checkpoints", "metrics.jsonl", "summary.json", "train_config.json", "training.png",
    ]  # fmt: skip


@pytest.fixture
def finished_again(uninterrupted: Path, run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to spoil."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


@pytest.mark.slow
def test_a_finished_run_writes_its_outputs_again(finished_again: Path, run_folder: Path, uninterrupted: Path):
    for name in ("training.png", "summary.json"):
        (finished_again / name).unlink()
    shutil.rmtree(finished_again / "adapter")
    train_here(run_folder, finished_again, resume=True)
    check_same(finished_again, uninterrupted)
    assert (finished_again / "training.png").stat().st_size > 0


@pytest.mark.slow
def test_the_checkpoint_before_serves_when_the_last_is_damaged(
    finished_again: Path, run_folder: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
):
    """Damage to one byte of an array, and to lines of the metrics file."""
    (arrays,) = (finished_again / "checkpoints" / str(STEPS) / "state" / "d").iterdir()
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    lines = (finished_again / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (finished_again / "metrics.jsonl").write_bytes(
        b"".join([*lines[:5], b"\xff\x00{\n", b'{"loss": 1.0}\n', *lines[5:]])
    )
    train_here(run_folder, finished_again, resume=True)
    before = f"going on from the checkpoint before, {finished_again}/checkpoints/{STEPS - CHECKPOINT_EVERY}"
    assert sum(before in line for line in caplog.messages) == 1
    assert f"{finished_again}/metrics.jsonl: 2 damaged line(s) left out" in caplog.messages
    check_same(finished_again, uninterrupted)
