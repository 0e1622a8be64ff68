"""Decoding at the memory limit: ms/token of AdaFuse, of its backbone and of its peers, beside what this GPU can read.

    python -m benchmarks.decode --out benchmarks/results/nvidia_h200 --conversations sharegpt.jsonl.gz

writes decode.json, decode.md and decode.png. The protocol is the paper's: ShareGPT queries one by one, 200 new tokens each,
Llama-2-7B shapes in bf16, E=8, R=64, k=2; the weights are random, so only the lengths of the prompts count. Everything that
is measured runs in a process of its own, and leaves its results in --out as part-*.json, from which the three files
are made. The parts can run at different times, and parts of parts, by the names that they print:

    python -m benchmarks.decode --out OUT --part jax --only backbone golden switch-qv
    python -m benchmarks.decode --out OUT --part merge          # measures nothing

    jax     ceilings; the backbone, and every strategy of the engine, with q, v and with all 7 linears adapted
    methods the methods that AdaFuse is compared with, in the same engine
    context a step by the length of its context, to the model's longest
    layer   one adapted layer: its backbone part and its adapter part, over rank and sequence length
    devices a step of one row on one GPU, and on --devices over which the model is sharded; continues at the same commit
    hf, peft, moe    the peers, see `benchmarks.peers`
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.jobs import Job, run_job_within
from benchmarks.common.records import command_line, commit, write_json
from benchmarks.common.timing import Stopwatch
from benchmarks.decode.costs import QUANTISED, SIZES
from benchmarks.decode.devices import is_finished, jobs_of_devices
from benchmarks.decode.prompts import make_prompts
from benchmarks.decode.report import EXTRA, merge_parts

PARTS = ("jax", "methods", "context", "layer", "devices", "hf", "peft", "moe")
ONE_ROW = ("golden", "switch", "simple")
"""Strategies that merge one row's experts into the weights, and so decode one row at a time."""
METHODS = (
    ("lora", "all7", "unmerged"), ("lora", "all7", "merged"), ("moral", "qv", "unmerged"), ("moral", "all7", "unmerged"),
    ("moral", "all7", "simple"), ("mola", "all7", "unmerged"), ("pesc", "-", "unmerged"),
)  # fmt: skip
"""(method, targets, strategy) of the part `methods`; AdaFuse's own simple merge is in `jax`."""
LAYERS = 4
"""Layers of the breakdown's model: enough that a step on the device takes longer than its dispatch."""


def place(method: str, targets: str, strategy: str = "-", batch: int = 1) -> dict[str, Any]:
    return {"method": method, "targets": targets, "strategy": strategy, "batch": batch}


def rows_module_job(name: str, kind: str, rows: Sequence[dict[str, Any]] = (), **settings: Any) -> Job:
    return Job(name=name, module="benchmarks.decode.rows", settings={"kind": kind, **settings}, rows=list(rows))


def rows_job(name: str, method: str, targets: str, strategy: str, batches: list[int]) -> Job:
    rows = [place(method, targets, strategy, batch) for batch in batches]
    return rows_module_job(name, "rows", rows, method=method, strategy=strategy, targets=targets, batches=batches)


def ceilings_job(*, is_tiny: bool) -> Job:
    elements, matmul_dim, seconds = (2**12, 64, 2e-4) if is_tiny else (2**30, 8192, 0.06)
    return rows_module_job("ceilings", "ceilings", elements=elements, matmul_dim=matmul_dim, seconds=seconds)


def jobs_of(part: str, arguments: argparse.Namespace) -> list[Job]:
    """Jobs of a part, in order. `seconds` in the settings are those of one repeat."""
    is_tiny = arguments.size == "tiny"
    if part == "layer":
        lengths, ranks = ([1, 16], [8]) if is_tiny else ([1, 128, 512, 2048], [8, 16, 32, 64, 128])
        layers, seconds = (1, 2e-4) if is_tiny else (LAYERS, 0.04)
        return [rows_module_job("layer", "layer", ranks=ranks, lengths=lengths, num_layers=layers, seconds=seconds)]
    if part == "context":
        return [rows_module_job("context", "contexts", contexts=[16, 64] if is_tiny else [128, 472, 984, 2008, 4056])]
    if part == "devices":
        several = jobs_of_devices(arguments.size, arguments.devices, arguments.quantize)
        return [ceilings_job(is_tiny=is_tiny), *several]
    if part == "jax":
        jobs = [ceilings_job(is_tiny=is_tiny)]
        strategies = ["fused", "unmerged", *ONE_ROW]
        batches = sorted(arguments.batches)
        jobs += [rows_job("backbone", "backbone", "-", "-", batches)]
        jobs += [rows_job("backbone-unmerged", "backbone", "-", "unmerged", batches)]
        for strategy in strategies:
            some = [b for b in batches if b == 1 or strategy not in ONE_ROW]
            jobs += [
                rows_job(f"{strategy}-{targets}", "adafuse", targets, strategy, some) for targets in ("qv", "all7")
            ]
        for name in arguments.quantize:
            jobs.append(rows_job(f"backbone-{name}", "backbone", "-", f"unmerged-{name}", batches))
            jobs.append(rows_job(f"unmerged-{name}", "adafuse", "all7", f"unmerged-{name}", batches))
            jobs.append(rows_job(f"fused-bare-{name}", "backbone", "-", f"fused-{name}", batches))
            jobs.append(rows_job(f"fused-{name}", "adafuse", "all7", f"fused-{name}", batches))
        return jobs
    if part == "methods":
        return [
            rows_job(f"{method}-{strategy}" + (f"-{targets}" if targets != "-" else ""), method, targets, strategy, [1])
            for method, targets, strategy in METHODS
        ]
    method = {"hf": "hf", "peft": "peft-lora", "moe": "lora-moe"}[part]
    endings = {"eager": "", "compiled": "-compiled"}
    jobs = []
    for targets in {"hf": ("-",), "peft": ("all7",), "moe": ("qv", "all7")}[part]:
        rows = [place(method + endings[form], targets) for form in arguments.forms]
        settings = {"method": method, "targets": targets, "forms": arguments.forms}
        name = part if targets == "-" else f"{part}-{targets}"
        jobs.append(Job(name=name, module="benchmarks.peers", settings=settings, rows=rows))
    return jobs


def is_measured(job: Job, found: dict[str, Any]) -> bool:
    """Return whether an earlier call of part devices has measured this."""
    if job.name == "ceilings":
        return "ceilings" in found
    return any(job.settings.items() <= row.items() for row in found.get("devices", []))


def run_part(part: str, arguments: argparse.Namespace, command: str) -> None:
    """Measure; part-*.json is written again after every job."""
    watch = Stopwatch()
    shapes = SIZES[arguments.size]
    prompts, queries, description = make_prompts(arguments, shapes)
    jobs = jobs_of(part, arguments)
    if arguments.only:
        jobs = [
            j
            for j in jobs
            if j.name == "ceilings" or any(j.name == o or j.name.startswith(f"{o}-") for o in arguments.only)
        ]
    if not [job for job in jobs if job.name != "ceilings"] and arguments.only != ["ceilings"]:
        print(f"part {part} has nothing of {arguments.only}", flush=True)
        return
    name = "-".join(["part", part + (str(arguments.devices) if part == "devices" else ""), *(arguments.only or ())])
    found: dict[str, Any] = {
        "part": part, "command": command, "commit": commit(), "size": arguments.size, "prompts": description,
        "versions": {}, "rows": [],
    }  # fmt: skip
    common = {
        "size": arguments.size, "prompts": prompts, "new_tokens": arguments.new_tokens, "queries": queries,
        "batch_queries": arguments.batch_queries, "row_seconds": arguments.row_seconds,
        "compile_seconds": arguments.compile_seconds,
    }  # fmt: skip
    path = arguments.out / f"{name}.json"
    if part == "devices" and path.exists() and (before := json.loads(path.read_text()))["commit"] == found["commit"]:
        found = before | {"devices": [*filter(is_finished, before.get("devices", []))]}
    python = arguments.torch_python if part in ("hf", "peft", "moe") else sys.executable
    for job in jobs:
        if is_measured(job, found):
            print(f"{job.name}: measured before", flush=True)
            continue
        answer = run_job_within(arguments.seconds - watch.seconds, job, common, arguments.job_seconds, python)
        if answer is None:
            continue
        result, problem = answer
        if problem and part == "devices" and job.name != "ceilings":  # which would have reported its row in the end
            result["devices"] = [job.settings | {"error": problem}]
        found["versions"] |= {name: result[name] for name in ("jax", "torch", "transformers") if name in result}
        found |= {key: result[key] for key in ("device", "ceilings") if key in result}
        for table in EXTRA:
            if table in result:
                found[table] = found.get(table, []) + result[table]
        rows = result.get("rows", [])
        measured = [{key: row[key] for key in place("", "")} for row in rows]
        rows += [row | {"error": problem or "no result"} for row in job.rows if row not in measured]
        found["rows"] += rows
        if problem and not job.rows and "devices" not in result:
            found.setdefault("problems", []).append(f"{job.name}: {problem}")
        found["finished"] = time.time()
        write_json(path, found)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the parts and of decode.json, .md, .png")
    parser.add_argument(
        "--conversations", type=Path, help="JSON or JSONL (.gz) of conversations; default: random prompts"
    )
    parser.add_argument("--queries", type=int, default=50, help="prompts, decoded one by one")
    parser.add_argument("--new-tokens", type=int, default=200, help="tokens decoded after each")
    parser.add_argument("--part", choices=("all", *PARTS, "merge"), default="all")
    parser.add_argument("--devices", type=int, default=2, help="of --part devices")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the part's jobs, those that begin with a name")
    parser.add_argument("--forms", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument(
        "--quantize",
        nargs="+",
        choices=QUANTISED,
        default=[],
        help="also rows of parts jax and devices with such weights",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument(
        "--batch-queries", type=int, default=3, help="batches decoded where a batch is more than one row"
    )
    parser.add_argument(
        "--prompt-tokens", nargs=2, type=int, default=[57, 312], metavar=("MIN", "MAX"),
        help="lengths of the questions taken; those of the default need one cache size, and so one compilation",
    )  # fmt: skip
    parser.add_argument("--row-seconds", type=float, default=60, help="a row begins no query after so many seconds")
    parser.add_argument("--compile-seconds", type=float, default=150, help="a peer compiles no other way after these")
    parser.add_argument("--job-seconds", type=float, default=450, help="a process is stopped after these")
    parser.add_argument("--seconds", type=float, default=86400.0, help="of each part; no process begins after these")
    parser.add_argument("--size", choices=SIZES, default="llama2-7b")
    parser.add_argument("--torch-python", default=sys.executable, help="the Python that has torch and transformers")
    arguments = parser.parse_args(argv)
    if min(arguments.queries, arguments.batch_queries, *arguments.batches) < 1 or arguments.new_tokens < 2:
        parser.error("--queries, --batch-queries and --batches must be at least 1, and --new-tokens at least 2")
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    command = command_line("benchmarks.decode", argv)
    for part in PARTS if arguments.part == "all" else () if arguments.part == "merge" else (arguments.part,):
        run_part(part, arguments, command)
    print(merge_parts(arguments.out), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
