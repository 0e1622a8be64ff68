"""Two real processes that train together: the numbers of one, one writer, a common end, and a resumed run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from training_runs import checkpoints_of, flags, metrics_of, run_folder, train_here  # noqa: F401 - a fixture

from adafuse_jax import UserError
from adafuse_jax.parallel import processes
from adafuse_jax.training.config import TrainConfig

SETTINGS: dict[str, Any] = {
    "steps": 40, "checkpoint_every": 10, "eval_every": 20, "batch_size": 2, "max_length": 32, "targets": "v_proj",
    "dropout": 0, "tied_share": None, "router_share": None,
}  # fmt: skip
LIMIT = 60
"""Seconds within which the end of one process must end the other."""


class Pair:
    """Two processes of one run, each with one CPU device."""

    def __init__(self, folder: Path, output: str, **changes: Any):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.run = folder / output
        self.processes = [
            subprocess.Popen(
                tiny.command(
                    "train",
                    flags(
                        folder, output, **SETTINGS, **changes, coordinator=f"localhost:{port}", num_processes=2,
                        process_id=number,
                    ),
                ),
                env=tiny.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )
            for number in (0, 1)
        ]  # fmt: skip

    def wait_for_steps(self, count: int) -> None:
        path = self.run / "metrics.jsonl"
        while not (path.exists() and path.read_bytes().count(b"\n") > count):
            assert all(process.poll() is None for process in self.processes), self.finish()
            time.sleep(0.01)

    def finish(self) -> list[tuple[int, str, str]]:
        """(exit code, stdout, last line of stderr) of both."""
        done = []
        for process in self.processes:
            out, error = process.communicate(timeout=300)
            done.append((process.returncode, out, (error.splitlines() or [""])[-1]))
        return done


def adapter_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def together(run_folder: Path) -> Path:  # noqa: F811
    """A finished run of two processes."""
    first, second = Pair(run_folder, "together").finish()
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert json.loads(first[1]) == json.loads((run_folder / "together" / "summary.json").read_text())
    assert second[1] == ""
    return run_folder / "together"


@pytest.mark.slow
def test_the_numbers_of_one_process(together: Path, run_folder: Path):  # noqa: F811
    """Losses and adapter to fp32 rounding. Both have written a part of the checkpoints."""
    train_here(run_folder, run_folder / "alone", **SETTINGS)
    for mine, theirs in zip(metrics_of(together), metrics_of(run_folder / "alone"), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    alone = adapter_of(run_folder / "alone")
    for name, leaf in adapter_of(together).items():
        assert np.abs(leaf - alone[name]).max() < 1e-3 * np.abs(alone[name]).max(), name
    state = together / "checkpoints" / "40" / "state"
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= {path.name for path in state.iterdir()}


@pytest.mark.slow
def test_a_signal_to_one_stops_both(together: Path, run_folder: Path):  # noqa: F811
    """At the same step, which is saved; resumed by two, the run ends bit-identical."""
    pair = Pair(run_folder, "stopped")
    pair.wait_for_steps(12)
    pair.processes[1].send_signal(signal.SIGTERM)
    (code, _, line), (other, _, _) = pair.finish()
    step = metrics_of(pair.run)[-1]["step"]
    assert (code, other) == (143, 143)
    assert line == f"stopped at step {step} of 40, which is saved; continue with --resume"
    assert checkpoints_of(pair.run)[-1] == step
    assert [code for code, *_ in Pair(run_folder, "stopped", resume=True).finish()] == [0, 0]
    assert metrics_of(pair.run) == metrics_of(together)
    for name, leaf in adapter_of(together).items():
        assert leaf.tobytes() == adapter_of(pair.run)[name].tobytes(), name


@pytest.mark.slow
def test_the_end_of_one_ends_the_other(together: Path, run_folder: Path):  # noqa: F811
    """Death of the first one, which writes and coordinates, with one line. One process then resumes the run."""
    pair = Pair(run_folder, "killed")
    pair.wait_for_steps(12)
    begun = time.monotonic()
    os.kill(pair.processes[0].pid, signal.SIGKILL)
    _, (code, _, line) = pair.finish()
    assert time.monotonic() - begun < LIMIT
    assert code == 2, line
    assert line.startswith("error: a computation of several processes failed, as it does when one has ended")
    assert line.endswith("continue with --resume")
    train_here(run_folder, pair.run, **SETTINGS, resume=True)
    for name, leaf in adapter_of(together).items():
        assert np.abs(leaf - adapter_of(pair.run)[name]).max() < 1e-3 * np.abs(leaf).max(), name


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"coordinator": "h:1"}, "belong together; give all three"),
        ({"num_processes": 2, "process_id": 0}, "belong together; give all three"),
        ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "--coordinator 'h': give host and port"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "--process-id 2: of 2 processes the last is 1"),
    ],
)
def test_flags_that_do_not_fit(flags, fault):
    with pytest.raises(UserError, match=fault):
        TrainConfig(model="m", dataset=("d",), output="o", **flags)


def test_a_coordinator_that_cannot_be(monkeypatch: pytest.MonkeyPatch):
    """A port that is taken, and one at which nobody listens."""
    monkeypatch.setattr(processes, "START_SECONDS", 0)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"--coordinator localhost:{port}: the port cannot be opened .*give another"
        ):
            processes.start(f"localhost:{port}", 2, 0)
    with pytest.raises(UserError, match=f"--coordinator localhost:{port}: cannot be reached .*start process 0"):
        processes.start(f"localhost:{port}", 2, 1)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a,b"}, True),
        ({"SLURM_NTASKS": "2"}, False),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_launchers(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool):
    """A shell within a job, or a pod that is not of an indexed job, is one process."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.is_one_of_several() == expected
