"""Rows of `--part devices`: meshes of several devices of one host beside one device.

    7B     each mesh; one device with a device's part of the batch, whose speed it is compared with; and one device with all
           of the batch in micro-batches, whose losses it is compared with, and in micro-batches of half the size, which says
           how far rounding alone moves them
    13B    without remat, on two devices: one alone runs out of memory, which is recorded
    70B    with remat, on four and on eight; few steps, as one takes seconds

Shapes are Llama-2's; `--models` takes some of them, `--meshes` other meshes. Weights are made in their shards. A row that
was measured at the same commit is not measured again, so a call that was stopped continues; the losses of one device may
also come from another machine, in another part. `--warm-up N` only compiles, N rows at once, into the cache of compiled
programs (`JAX_COMPILATION_CACHE_DIR`), from which the measuring calls take them. On a host with fewer GPUs it compiles for
more of the same kind: training-planN.json says what fits. `--size tiny` has the same rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.jobs import Job, run_job
from benchmarks.common.records import write_json

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
LARGE_MESHES: dict[int, tuple[str, ...]] = MESHES | {4: ("fsdp=4",)}
"""The meshes on which 70B shapes fit."""
BATCH, LENGTH, TINY_LENGTH = 4, 2048, 128
"""Sequences of one device, and their tokens."""
LOSS_STEPS = {"steps": 10, "repeats": 1}
"""Steps of a row whose losses count: with the repeat that warms up, 20."""
FEW_STEPS = {"steps": 2, "repeats": 3}


def rows_of_devices(
    size: str, devices: int, models: list[str] | None, meshes: list[str] | None
) -> list[dict[str, Any]]:
    rows = []
    for model in models or MODELS.get(devices, ("llama2-7b",)):
        if model == "llama2-70b":
            rows += large_rows(model, devices, meshes)
        elif model == "llama2-13b":
            places = "fsdp=1", *(meshes or [f"fsdp={devices}"])
            rows += [mesh_row(model, "adafuse", "none", mesh, BATCH * devices) for mesh in places]
        else:
            rows += scaling_rows(model, devices, meshes)
    return [*map(tiny, rows)] if size == "tiny" else rows


def scaling_rows(model: str, devices: int, meshes: list[str] | None) -> list[dict[str, Any]]:
    rows = []
    for method in ("adafuse", "lora"):
        row = partial(mesh_row, model, method, "products")
        rows.append(row("fsdp=1", BATCH))
        rows += [row(mesh, BATCH * devices) for mesh in meshes or meshes_of(devices, MESHES)]
        for parts in (1, 2):
            rows.append(row("fsdp=1", BATCH // parts) | {"accum": parts * devices} | LOSS_STEPS)
    return rows


def large_rows(model: str, devices: int, meshes: list[str] | None) -> list[dict[str, Any]]:
    """AdaFuse on each mesh, LoRA on the first."""
    meshes = meshes or [*meshes_of(devices, LARGE_MESHES)]
    places = [("adafuse", meshes[0]), ("lora", meshes[0]), *(("adafuse", mesh) for mesh in meshes[1:])]
    return [mesh_row(model, method, "full", mesh, BATCH * devices) | FEW_STEPS for method, mesh in places]


def meshes_of(devices: int, table: dict[int, tuple[str, ...]]) -> tuple[str, ...]:
    return table.get(devices, (f"data={devices}", f"fsdp={devices}"))


def mesh_row(model: str, method: str, remat: str, mesh: str, batch: int) -> dict[str, Any]:
    """A row whose layers are scanned."""
    return {
        "size": model, "method": method, "targets": "all7", "batch": batch, "length": LENGTH, "remat": remat,
        "unroll": False, "segments": 1, "accum": 1, "mesh": mesh, "devices": size_of(mesh),
    }  # fmt: skip


def tiny(row: dict[str, Any]) -> dict[str, Any]:
    """The same row of the tiny model, with two sequences for each device."""
    return row | {"size": "tiny", "batch": 2 * row["batch"] // BATCH, "length": TINY_LENGTH}


def size_of(mesh: str) -> int:
    """Devices of a mesh like data=2,fsdp=4."""
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(","))


def is_finished(row: dict[str, Any]) -> bool:
    """Return whether a row has its result, which may be that the device has too little memory."""
    return "ms" in row or "RESOURCE_EXHAUSTED" in row.get("error", "")


def losses_of_one(out: Path, commit: str | None) -> list[dict[str, Any]]:
    """Rows of one device that count for their losses alone, of any part in `out` and of this commit."""
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("training-part-devices*.json"))]
    rows = [row for part in parts if part["commit"] == commit for row in part["rows"]]
    return [row for row in rows if row.get("accum", 1) > 1 and is_finished(row)]


def warm_up(jobs: list[Job], arguments: argparse.Namespace, commit: str | None) -> None:
    """Compile the jobs' programs in `arguments.warm_up` processes at once, and write what a device needs by the compiler's
    plan. None of them takes the device's whole memory. Where devices are missing it is for others of the same kind."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    record: dict[str, Any] = {"commit": commit, "rows": []}
    with ThreadPoolExecutor(arguments.warm_up) as pool:
        answers = pool.map(
            lambda job: run_job(job, {"only_compile": True}, arguments.job_seconds, sys.executable), jobs
        )
        for job, (found, problem) in zip(jobs, answers, strict=True):
            error = found.get("error") or problem
            planned = {key: found[key] for key in ("compile_seconds", "planned_gib") if key in found}
            record["device"] = found.get("device", record.get("device"))
            record["rows"] += [row | planned | ({"error": error} if error else {}) for row in job.rows]
            write_json(arguments.out / f"training-plan{arguments.devices}.json", record)
            print(f"{job.name}: {error or '{compile_seconds:.0f} s, {planned_gib} GiB'.format(**found)}", flush=True)
