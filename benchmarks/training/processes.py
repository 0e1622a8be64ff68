"""Training by two processes with half of the devices each, as a stand-in for two hosts; stopped, killed, resumed by others.

    python -m benchmarks.training.processes --devices 8 --work /tmp/processes --out benchmarks/results/nvidia_h200

runs `train.py` on a small random model in float32, and writes processesN.json, N the number of devices:

    two processes    have the losses of one with all devices, and each writes a part of the checkpoints
    resumed by one   from their checkpoint in the middle, on all devices
    stopped          by a signal to the second one, both at the same step, which is saved; resumed by two
    killed           on one device and resumed on all; on all and resumed on one

Exits with 1 if any of it fails or is missing. Checks that passed at the same commit are not run again, so a call that was
stopped, or that ends after --seconds, continues. With JAX_PLATFORMS=cpu the devices are virtual.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.records import command_line, commit, write_json
from benchmarks.common.timing import Stopwatch
from benchmarks.decode.costs import SIZES
from benchmarks.full_size import write_texts

BATCH, LENGTH, ONE = 8, 128, [range(1)]
REFERENCE = "one process"
"""The check whose losses the others are compared with."""
TOLERANCE = 1e-3
"""Largest difference of losses, in nats: sums over devices are in another order, and differences grow from step to step."""
RUN_SECONDS = 300


def with_devices(devices: range) -> dict[str, str]:
    """Environment of a process that has these devices alone."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={len(devices)}"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(devices.stop)]
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(names[i] for i in devices)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Run:
    """A training run of `steps`, with three checkpoints: its output directory, and the processes that train."""

    def __init__(self, work: Path, name: str, steps: int):
        self.work, self.path, self.steps = work, work / name, steps

    def start(self, shares: Sequence[range], *, resume: bool = False) -> Run:
        """Start a process for each share of the devices. What an earlier call has left of a new run is removed."""
        if not resume:
            shutil.rmtree(self.path, ignore_errors=True)
        flags = [
            f"--model={self.work / 'model'}", f"--dataset={self.work / 'texts.jsonl'}", f"--output={self.path}",
            "--targets=all", "--num-experts=8", "--rank=8", "--dropout=0", "--dtype=float32", "--learning-rate=1e-3",
            f"--steps={self.steps}",
            f"--batch-size={BATCH}", f"--max-length={LENGTH}", f"--checkpoint-every={self.steps // 3}",
            "--keep-checkpoints=10", "--eval-examples=0", *(["--resume"] if resume else []),
        ]  # fmt: skip
        join = [f"--coordinator=localhost:{free_port()}", f"--num-processes={len(shares)}"] if len(shares) > 1 else []
        self.processes = [
            subprocess.Popen(
                [sys.executable, "train.py", *flags, *join, *([f"--process-id={number}"] if join else [])],
                env=with_devices(share), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=self.log(number).open("w"),
            )
            for number, share in enumerate(shares)
        ]  # fmt: skip
        return self

    def log(self, number: int) -> Path:
        """Where a process writes its stderr."""
        return self.work / f"{self.path.name}.{number}.log"

    def send(self, number: int, what: signal.Signals, after: int) -> Run:
        """Send a signal to a process once `after` steps are recorded and a checkpoint is complete."""

        def is_early() -> bool:
            return len(self.losses()) < after or not self.checkpoints()

        begun = time.monotonic()
        while is_early() and all(process.poll() is None for process in self.processes):
            if time.monotonic() - begun > RUN_SECONDS:
                break
            time.sleep(0.005)
        self.processes[number].send_signal(what)
        return self

    def finish(self) -> list[tuple[int, str]]:
        """(exit code, last line of stderr) of each process."""
        ends = []
        for number, process in enumerate(self.processes):
            try:
                process.wait(RUN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            lines = self.log(number).read_text(errors="replace").splitlines() or [""]
            if process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGKILL):
                print("\n".join(lines[-5:]), flush=True)
            ends.append((process.returncode, lines[-1]))
        return ends

    def losses(self) -> list[float]:
        """Losses of the steps that are recorded, the first step first."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    def checkpoints(self) -> list[int]:
        """Steps of the complete ones."""
        return sorted(int(path.name) for path in (self.path / "checkpoints").glob("*") if path.name.isdigit())

    def rewound(self, name: str, step: int) -> Run:
        """A copy of the run with its checkpoints up to a step."""
        copy = Run(self.work, name, self.steps)
        shutil.rmtree(copy.path, ignore_errors=True)
        shutil.copytree(self.path, copy.path)
        for later in (number for number in copy.checkpoints() if number > step):
            shutil.rmtree(copy.path / "checkpoints" / str(later))
        return copy


@dataclass(frozen=True)
class Plan:
    """Steps of a run, its devices as one share and as two, and the losses of one process with all of them."""

    work: Path
    steps: int
    everything: Sequence[range]
    halves: Sequence[range]
    losses: list[float]

    @property
    def first_saved(self) -> int:
        return self.steps // 3

    def run(self, name: str) -> Run:
        return Run(self.work, name, self.steps)

    def ended(self, run: Run) -> tuple[bool, dict[str, Any]]:
        """(true if the run goes to its end with the losses of one process, its facts)."""
        ends, losses, apart = run.finish(), run.losses(), None
        if len(losses) == len(self.losses) == self.steps:
            apart = max(abs(a - b) for a, b in zip(losses, self.losses, strict=True))
        is_good = all(code == 0 for code, _ in ends) and apart is not None and apart < TOLERANCE
        return is_good, {"ends": ends, "losses_apart": apart}


Checks = Iterator[tuple[bool, dict[str, Any]]]
"""(true if it is as it should be, its facts) of each check; the work is done as they are asked for."""


def alone(plan: Plan) -> Checks:
    run = plan.run("alone").start(plan.everything)
    ends, losses = run.finish(), run.losses()
    is_good = (
        ends[0][0] == 0 and len(losses) == plan.steps and losses[0] - losses[-1] > 10 * TOLERANCE
    )  # or none differ
    yield is_good, {"ends": ends, "losses": losses}


def together(plan: Plan) -> Checks:
    run = plan.run("together").start(plan.halves)
    is_good, facts = plan.ended(run)
    state = run.path / "checkpoints" / str(plan.steps) / "state"
    writers = sorted(path.name for path in state.glob("ocdbt.process_*"))
    yield is_good and len(writers) == 2, facts | {"writers": writers}
    is_good, facts = plan.ended(run.rewound("by-one", plan.first_saved).start(plan.everything, resume=True))
    yield is_good, facts | {"from": plan.first_saved}


def stopped(plan: Plan) -> Checks:
    run = plan.run("stopped").start(plan.halves).send(1, signal.SIGTERM, plan.first_saved + 5)
    ends = run.finish()
    found = re.match(rf"stopped at step (\d+) of {plan.steps}, which is saved", ends[0][1])
    step = int(found[1]) if found else None
    is_good = [code for code, _ in ends] == [128 + signal.SIGTERM] * 2 and run.checkpoints()[-1:] == [step]
    yield is_good, {"ends": ends, "step": step, "recorded": len(run.losses())}
    is_good, facts = plan.ended(run.start(plan.halves, resume=True))
    yield is_good, facts | {"from": step}


def killed(plan: Plan, name: str, first: Sequence[range], second: Sequence[range]) -> Checks:
    run = plan.run(name).start(first).send(0, signal.SIGKILL, plan.first_saved + 5)
    ends, last = run.finish(), max(run.checkpoints(), default=0)
    is_good, facts = plan.ended(run.start(second, resume=True))
    was_killed = ends[0][0] == -signal.SIGKILL and 0 < last < plan.steps
    yield is_good and was_killed, facts | {"killed": ends, "from": last}


SCENARIOS: dict[tuple[str, ...], Callable[[Plan], Checks]] = {
    (REFERENCE,): alone,
    ("two processes", "resumed by one"): together,
    ("a signal to one stops both", "resumed by two"): stopped,
    ("killed on one device, resumed on all",): lambda plan: killed(plan, "killed-on-one", ONE, plan.everything),
    ("killed on all devices, resumed on one",): lambda plan: killed(plan, "killed-on-all", plan.everything, ONE),
}
"""Names of the checks → the runs that make them, together."""


def prepare(arguments: argparse.Namespace) -> None:
    """The model and the texts that the runs train on."""
    if (arguments.work / "texts.jsonl").exists():
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    write = ["--size", arguments.size, "--work", str(arguments.work), "--out", str(arguments.out), "--only", "write"]
    command = [sys.executable, "-m", "benchmarks.full_size", *write]
    subprocess.run(command, check=True, env=with_devices(range(1)))
    write_texts(arguments.work / "texts.jsonl", 4 * BATCH, LENGTH)


def record_of(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier call with these keys, with the checks that passed; or a new one."""
    record = json.loads(path.read_text()) if path.exists() else {}
    if any(record.get(key) != value for key, value in keys.items()):
        return keys | {"checks": {}}
    return record | {"checks": {name: check for name, check in record["checks"].items() if check["as_expected"]}}


def main(argv: Sequence[str], scenarios: dict[tuple[str, ...], Callable[[Plan], Checks]] = SCENARIOS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, choices=(2, 4, 8), required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=120, help="of each run, at least 21")
    parser.add_argument("--seconds", type=float, default=86400.0, help="no check begins after these")
    parser.add_argument("--work", type=Path, required=True, help="directory for the model and the runs")
    parser.add_argument("--out", type=Path, required=True, help="directory of processesN.json")
    arguments, watch = parser.parse_args(argv), Stopwatch()
    if arguments.steps < 21:
        parser.error("--steps must be at least 21")
    path, devices = arguments.out / f"processes{arguments.devices}.json", range(arguments.devices)
    keys = {
        "commit": commit(), "devices": arguments.devices, "size": arguments.size, "steps": arguments.steps,
    }  # fmt: skip
    record = record_of(path, keys) | {"command": command_line("benchmarks.training.processes", argv)}
    half = len(devices) // 2
    for names, scenario in scenarios.items():
        if record["checks"].keys() >= set(names):
            print(f"measured before: {'; '.join(names)}", flush=True)
            continue
        if watch.seconds > arguments.seconds:
            print(f"not begun, as the time is over; the same command continues: {'; '.join(names)}", flush=True)
            continue
        prepare(arguments)
        losses = record["checks"].get(REFERENCE, {}).get("losses", [])
        plan = Plan(arguments.work, arguments.steps, [devices], [devices[:half], devices[half:]], losses)
        begun = watch.seconds
        if REFERENCE not in names and len(losses) != arguments.steps:
            print(f"not begun, as no losses are there to compare with: {'; '.join(names)}", flush=True)
            continue
        for name, (is_good, facts) in zip(names, scenario(plan), strict=True):
            seconds = watch.seconds - begun
            record["checks"][name] = {"as_expected": is_good, "seconds": round(seconds, 1)} | facts
            write_json(path, record)
            shown = {key: value for key, value in facts.items() if key != "losses"}
            print(f"{'ok    ' if is_good else 'FAILED'} {name}, {seconds:.0f} s: {shown}", flush=True)
            begun = watch.seconds
    passed = {name for name, check in record["checks"].items() if check["as_expected"]}
    return 0 if passed == {name for names in scenarios for name in names} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
