"""Rows of `--part devices`: meshes of several devices of one host beside one device.

    7B     each mesh; one device with a device's part of the batch, whose speed it is compared with; and one device with all
           of the batch in micro-batches, whose losses it is compared with
    13B    without remat, on two devices: one alone runs out of memory, which is recorded
    70B    with remat, on four and on eight

Shapes are Llama-2's; `--models` takes some of them, `--meshes` other meshes. Weights are made in their shards. A row that
was measured at the same commit is not measured again, so a call that was stopped continues. `--warm-up N` only compiles, N
rows at once, into the cache of compiled programs (`JAX_COMPILATION_CACHE_DIR`), from which the measuring calls take them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common.jobs import Job, run_job

MESHES: dict[int, tuple[str, ...]] = {
    2: ("data=2", "fsdp=2"),
    4: ("fsdp=4", "data=2,fsdp=2", "fsdp=2,tensor=2"),
    8: ("fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2"),
}  # fmt: skip
"""Number of devices → meshes of the scaling rows; of others data and fsdp alone."""
MODELS: dict[int, tuple[str, ...]] = {
    2: ("llama2-7b", "llama2-13b"),
    4: ("llama2-7b", "llama2-70b"),
    8: ("llama2-7b", "llama2-70b"),
}
BATCH, LENGTH = 4, 2048
"""Sequences of one device, and their tokens."""
NO_COMPARISON = {"llama2-13b": ("none", ("adafuse",)), "llama2-70b": ("full", ("adafuse", "lora"))}
"""Shapes that do not train on one device → remat, methods."""
LOSS_STEPS = {"steps": 10, "repeats": 1}
"""Steps of the row whose losses count: with the repeat that warms up, 20."""


def rows_of_devices(
    size: str, devices: int, models: list[str] | None, meshes: list[str] | None
) -> list[dict[str, Any]]:
    if size == "tiny":
        return scaling_rows("tiny", devices, meshes, batch=1, length=128)
    rows = []
    for model in models or MODELS.get(devices, ("llama2-7b",)):
        if model in NO_COMPARISON:
            rows += rows_without_comparison(model, devices, meshes)
        else:
            rows += scaling_rows(model, devices, meshes, batch=BATCH, length=LENGTH)
    return rows


def scaling_rows(model: str, devices: int, meshes: list[str] | None, batch: int, length: int) -> list[dict[str, Any]]:
    rows = []
    for method in ("adafuse", "lora"):
        common = row_of(model, method, "products", length)
        rows += [
            common | {"batch": batch, "mesh": "fsdp=1", "devices": 1},
            common | {"batch": batch, "mesh": "fsdp=1", "devices": 1, "accum": devices} | LOSS_STEPS,
        ]
        for mesh in meshes or MESHES.get(devices, (f"data={devices}", f"fsdp={devices}")):
            rows.append(common | {"batch": batch * devices, "mesh": mesh, "devices": size_of(mesh)})
    return rows


def rows_without_comparison(model: str, devices: int, meshes: list[str] | None) -> list[dict[str, Any]]:
    remat, methods = NO_COMPARISON[model]
    of_one = ["fsdp=1"] if model == "llama2-13b" else []
    return [
        row_of(model, method, remat, LENGTH) | {"batch": BATCH * devices, "mesh": mesh, "devices": size_of(mesh)}
        for method in methods
        for mesh in (*of_one, *(meshes or (f"fsdp={devices}",)))
    ]


def row_of(model: str, method: str, remat: str, length: int) -> dict[str, Any]:
    """A row without its mesh and batch, its layers scanned."""
    return {
        "size": model, "method": method, "targets": "all7", "length": length, "remat": remat, "unroll": False,
        "segments": 1, "accum": 1,
    }  # fmt: skip


def size_of(mesh: str) -> int:
    """Devices of a mesh like data=2,fsdp=4."""
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(","))


def is_finished(row: dict[str, Any]) -> bool:
    """Return whether a row has its result, which may be that the device has too little memory."""
    return "ms" in row or "RESOURCE_EXHAUSTED" in row.get("error", "")


def warm_up(jobs: list[Job], arguments: argparse.Namespace) -> None:
    """Compile the jobs' programs in `arguments.warm_up` processes at once. None of them takes the device's whole memory."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with ThreadPoolExecutor(arguments.warm_up) as pool:
        only_compile = {"only_compile": True}
        for job, (found, problem) in zip(
            jobs, pool.map(lambda job: run_job(job, only_compile, arguments.job_seconds, sys.executable), jobs), strict=True
        ):  # fmt: skip
            planned = problem or f"{found['compile_seconds']:.0f} s, {found['planned_gib']} GiB"
            print(f"{job.name}: {planned}", flush=True)
