"""Training speed: tokens/s and peak memory of AdaFuse and LoRA beside Hugging Face with PEFT, and where the time goes.

    python -m benchmarks.training --out benchmarks/results/nvidia_h200

writes training.json, training.md and training.png. Llama-2-7B shapes, all 7 linears adapted, R=64, bf16, full sequences of
random tokens; and SmolLM2-135M shapes. Each row is measured in a process of its own, and leaves its results in --out as
training-part-*.json, from which the three files are made. The parts can run at different times:

    curve   correct first: losses of a small model over 20 steps, in float32, beside PEFT's from the same weights
    jax     this project's rows
    peers   PEFT's LoRA, eager and compiled
    devices meshes of --devices devices beside one, see `benchmarks.training.devices`; not of `all`
    merge   measures nothing
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.jobs import Job, run_job, run_job_within
from benchmarks.common.records import command_line, commit, write_json
from benchmarks.common.timing import Stopwatch
from benchmarks.training.devices import is_finished, losses_of_one, rows_of_devices, warm_up
from benchmarks.training.report import merge_parts
from benchmarks.training.shapes import SHAPES

PARTS = ("curve", "jax", "peers")
KEYS = ("size", "method", "targets", "batch", "length", "remat", "unroll", "segments")


def row(method: str, remat: str, batch: int, length: int, segments: int = 1, *, unroll: bool = True, size: str) -> dict:
    values = (size, method, "all7", batch, length, remat, unroll, segments)
    return dict(zip(KEYS, values, strict=True))


def rows_of(size: str) -> list[dict[str, Any]]:
    """The rows of the table; with `tiny` the same ones at sizes for a test."""
    big, small = ("tiny", "tiny") if size == "tiny" else ("llama2-7b", "smollm2-135m")
    scale = 16 if size == "tiny" else 1
    shapes = [
        ("adafuse", "none", 4, 2048, 1, False, big), ("adafuse", "none", 4, 2048, 8, False, big),
        ("adafuse", "products", 4, 2048, 1, False, big), ("adafuse", "products", 4, 2048, 1, True, big),
        ("adafuse", "attention", 4, 2048, 1, False, big), ("adafuse", "full", 8, 1024, 1, False, big),
        ("lora", "none", 4, 2048, 1, False, big), ("lora", "products", 4, 2048, 1, True, big),
        ("adafuse", "none", 16, 512, 1, False, small), ("adafuse", "none", 16, 512, 1, True, small),
    ]  # fmt: skip
    rows = [
        row(method, remat, max(1, batch // scale), length // scale, segments, unroll=unroll, size=name)
        for method, remat, batch, length, segments, unroll, name in shapes
    ]
    return [*rows, rows[0] | {"products": "dense"}]  # beside the products that are chosen


def name_of(row: dict[str, Any]) -> str:
    form = "unrolled" if row["unroll"] else "scanned"
    packed = f"-{row['segments']}segments" if row["segments"] > 1 else ""
    accum = f"x{row['accum']}" if row.get("accum", 1) > 1 else ""
    mesh = f"-{row['mesh']}-batch{row['batch']}{accum}" if "mesh" in row else ""
    products = f"-{row['products']}" if "products" in row else ""
    return f"{row['method']}-{row['remat']}-{form}{packed}-{row['size']}{mesh}{products}"


def jobs_of(part: str, arguments: argparse.Namespace) -> list[Job]:
    common = {"steps": arguments.steps, "repeats": arguments.repeats, "profile": not arguments.no_profile}
    if part in ("jax", "devices"):
        several = arguments.size, arguments.devices, arguments.models, arguments.meshes
        rows = rows_of(arguments.size) if part == "jax" else rows_of_devices(*several)
        return [
            Job(name=name_of(row), module="benchmarks.training.rows", settings=common | row, rows=[row]) for row in rows
        ]
    wanted = next(row for row in rows_of(arguments.size) if row["method"] == "lora")
    rows = [wanted | {"method": f"peft-lora{end}", "remat": "none", "unroll": None} for end in ("", "-compiled")]
    settings = wanted | common | {"forms": ["eager", "compiled"]}
    return [Job(name="peft-lora", module="benchmarks.training.peers", settings=settings, rows=rows)]


def measure_curve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses of PEFT, and the largest difference of ours, over 20 steps of a small model."""
    with tempfile.TemporaryDirectory() as work:
        settings = {"work": work, "batch": 2, "length": 32}
        peer, problem = run_job(
            Job(name="curve of peft", module="benchmarks.training.peers", settings=settings), {}, arguments.job_seconds,
            arguments.torch_python,
        )  # fmt: skip
        if problem:
            return {"error": problem}
        settings["losses"] = peer["losses"]
        ours, problem = run_job(
            Job(name="curve of train_step", module="benchmarks.training.curve", settings=settings), {},
            arguments.job_seconds, sys.executable,
        )  # fmt: skip
    return {"peft": peer, "ours": ours} | ({"error": problem} if problem else {})


def run_part(part: str, arguments: argparse.Namespace, command: str) -> None:
    """Measure; training-part-*.json is written again after every job."""
    watch = Stopwatch()
    found: dict[str, Any] = {"part": part, "command": command, "commit": commit(), "rows": [], "versions": {}}
    name = f"devices{arguments.devices}" if part == "devices" else part
    of_some = re.sub(r"[^\w.-]", "_", "-".join([name, *(arguments.only or ())]))
    path = arguments.out / f"training-part-{of_some}.json"
    if part == "curve":
        write_json(path, found | {"curve": measure_curve(arguments), "finished": time.time()})
        return
    jobs = [
        job
        for job in jobs_of(part, arguments)
        if not arguments.only or any(job.name.startswith(name) for name in arguments.only)
    ]
    if part == "devices":  # XLA's own limit is three quarters of the device
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    if arguments.warm_up:
        warm_up(jobs, arguments, found["commit"])
        return
    if part == "devices" and path.exists() and (before := json.loads(path.read_text()))["commit"] == found["commit"]:
        found |= before | {"rows": [row for row in before["rows"] if is_finished(row)]}
    elsewhere = losses_of_one(arguments.out, found["commit"]) if part == "devices" else []
    for job in jobs:
        before = [*found["rows"], *elsewhere]
        if all(any(wanted.items() <= row.items() for row in before) for wanted in job.rows):
            print(f"{job.name}: measured before", flush=True)
            continue
        python = arguments.torch_python if part == "peers" else sys.executable
        answer = run_job_within(arguments.seconds - watch.seconds, job, {}, arguments.job_seconds, python)
        if answer is None:
            continue
        result, problem = answer
        found["versions"] |= {name: result[name] for name in ("jax", "torch", "transformers", "peft") if name in result}
        found |= {"device": result["device"]} if "device" in result else {}
        measured = result.get("rows") or ([result] if "ms" in result else [])
        for index, keys in enumerate(job.rows):
            values = measured[index] if index < len(measured) and "ms" in measured[index] else {}
            values = {name: value for name, value in values.items() if name not in ("device", "jax", "commit")}
            error = {} if values else {"error": result.get("error") or problem or "no result"}
            error |= {"planned_gib": result["planned_gib"]} if error and "planned_gib" in result else {}
            found["rows"].append({"devices": 1} | keys | values | error)
        write_json(path, found | {"finished": time.time()})


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the parts, training.json, .md and .png")
    parser.add_argument("--part", choices=("all", *PARTS, "devices", "merge"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the part's jobs, those that begin with a name")
    parser.add_argument("--devices", type=int, default=2, help="of --part devices")
    parser.add_argument("--models", nargs="+", choices=SHAPES, help="of --part devices")
    parser.add_argument("--meshes", nargs="+", metavar="MESH", help="of --part devices, as data=2,fsdp=4")
    parser.add_argument(
        "--warm-up", type=int, default=0, metavar="N", help="of --part devices: compile, N rows at once"
    )
    parser.add_argument("--steps", type=int, default=8, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-profile", action="store_true", help="no times by kind of kernel")
    parser.add_argument("--job-seconds", type=float, default=450, help="a process is stopped after these")
    parser.add_argument("--seconds", type=float, default=86400.0, help="of each part; no row begins after these")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="the Python that has torch, transformers and peft"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.repeats) < 1:
        parser.error("--steps and --repeats must be at least 1")
    if arguments.part != "devices" and (arguments.models or arguments.meshes or arguments.warm_up):
        parser.error("--models, --meshes and --warm-up are of --part devices")
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    command = command_line("benchmarks.training", argv)
    for part in PARTS if arguments.part == "all" else () if arguments.part == "merge" else (arguments.part,):
        run_part(part, arguments, command)
    if arguments.warm_up:
        return
    print(merge_parts(arguments.out), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
