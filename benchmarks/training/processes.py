"""Training by two processes with half of the devices each, as a stand-in for two hosts; stopped, killed, resumed by others.

    python -m benchmarks.training.processes --devices 8 --work /tmp/processes --out benchmarks/results/nvidia_h200

runs `train.py` on a small random model in float32, and writes processesN.json, N the number of devices:

    two processes    have the losses of one with all devices, and each writes a part of the checkpoints
    resumed by one   from their checkpoint in the middle, on all devices
    stopped          by a signal to the second one, both at the same step, which is saved; resumed by two
    killed           on one device and resumed on all; on all and resumed on one

Exits with 1 if any of it fails. With JAX_PLATFORMS=cpu the devices are virtual.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.records import command_line, commit, write_json
from benchmarks.common.timing import Stopwatch
from benchmarks.decode.costs import SIZES
from benchmarks.full_size import write_texts

BATCH, LENGTH = 8, 128
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
        """Start a process for each share of the devices."""
        flags = [
            f"--model={self.work / 'model'}", f"--dataset={self.work / 'texts.jsonl'}", f"--output={self.path}",
            "--targets=all", "--num-experts=8", "--rank=8", "--dropout=0", "--dtype=float32", f"--steps={self.steps}",
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
        """Send a signal to a process once `after` steps are recorded."""
        begun = time.monotonic()
        while len(self.losses()) < after and all(process.poll() is None for process in self.processes):
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
        return sorted(int(path.name) for path in (self.path / "checkpoints").iterdir() if path.name.isdigit())

    def rewound(self, name: str, step: int) -> Run:
        """A copy of the run with its checkpoints up to a step."""
        copy = Run(self.work, name, self.steps)
        shutil.copytree(self.path, copy.path)
        for later in (number for number in copy.checkpoints() if number > step):
            shutil.rmtree(copy.path / "checkpoints" / str(later))
        return copy


def distance(run: Run, other: Run) -> float | None:
    """Largest difference of two finished runs' losses; None unless both have all of them."""
    mine, theirs = run.losses(), other.losses()
    if not len(mine) == len(theirs) == run.steps:
        return None
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


def checks(work: Path, devices: int, steps: int) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Yield (name, whether it is as it should be, its facts), one after the other."""
    everything, halves = [range(devices)], [range(devices // 2), range(devices // 2, devices)]
    first_saved, early = steps // 3, steps // 3 + 5

    def ended(name: str, run: Run, facts: dict[str, Any]) -> tuple[str, bool, dict[str, Any]]:
        """The check of a run that goes to its end."""
        ends, apart = run.finish(), distance(run, alone)
        is_good = all(code == 0 for code, _ in ends) and apart is not None and apart < TOLERANCE
        return name, is_good, facts | {"ends": ends, "losses_apart": apart}

    alone = Run(work, "alone", steps).start(everything)
    ends = alone.finish()
    yield "one process", ends[0][0] == 0 and len(alone.losses()) == steps, {"ends": ends}

    together = Run(work, "together", steps).start(halves)
    name, is_good, facts = ended("two processes", together, {})
    state = together.path / "checkpoints" / str(steps) / "state"
    writers = sorted(path.name for path in state.glob("ocdbt.process_*"))
    yield name, is_good and len(writers) == 2, facts | {"writers": writers}
    yield ended(
        "resumed by one", together.rewound("by-one", first_saved).start(everything, resume=True), {"from": first_saved}
    )

    stopped = Run(work, "stopped", steps).start(halves).send(1, signal.SIGTERM, early)
    ends = stopped.finish()
    found = re.match(rf"stopped at step (\d+) of {steps}, which is saved", ends[0][1])
    step = int(found[1]) if found else None
    is_good = [code for code, _ in ends] == [128 + signal.SIGTERM] * 2 and stopped.checkpoints()[-1] == step
    yield "a signal to one stops both", is_good, {"ends": ends, "step": step, "recorded": len(stopped.losses())}
    yield ended("resumed by two", stopped.start(halves, resume=True), {"from": step})

    for name, first, second in (
        ("killed on one device, resumed on all", [range(1)], everything),
        ("killed on all devices, resumed on one", everything, [range(1)]),
    ):
        killed = Run(work, name.split(",")[0].replace(" ", "-"), steps).start(first).send(0, signal.SIGKILL, early)
        ends = killed.finish()
        last = killed.checkpoints()[-1]
        yield ended(name, killed.start(second, resume=True), {"killed": ends, "from": last})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, choices=(2, 4, 8), required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=120, help="of each run, at least 21")
    parser.add_argument("--work", type=Path, required=True, help="new directory for the model and the runs")
    parser.add_argument("--out", type=Path, required=True, help="directory of processesN.json")
    arguments = parser.parse_args(argv)
    if arguments.steps < 21:
        parser.error("--steps must be at least 21")
    arguments.work.mkdir(parents=True)
    write_texts(arguments.work / "texts.jsonl", 4 * BATCH, LENGTH)
    write = ["--size", arguments.size, "--work", str(arguments.work), "--out", str(arguments.out), "--only", "write"]
    command = [sys.executable, "-m", "benchmarks.full_size", *write]
    subprocess.run(command, check=True, env=with_devices(range(1)))
    record: dict[str, Any] = {
        "command": command_line("benchmarks.training.processes", argv), "commit": commit(), "devices": arguments.devices,
        "size": arguments.size, "steps": arguments.steps, "checks": {},
    }  # fmt: skip
    watch = Stopwatch()
    for name, is_good, facts in checks(arguments.work, arguments.devices, arguments.steps):
        record["checks"][name] = {"as_expected": is_good, "seconds": round(watch.seconds, 1)} | facts
        write_json(arguments.out / f"processes{arguments.devices}.json", record)
        print(f"{'ok    ' if is_good else 'FAILED'} {name}, {watch.seconds:.0f} s: {facts}", flush=True)
        watch = Stopwatch()
    return 0 if all(check["as_expected"] for check in record["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
