"""Decoding at the memory limit: ms/token of AdaFuse, of its backbone and of its peers, beside what this GPU can read.

    python -m benchmarks.decode --out benchmarks/results/nvidia_h200 --conversations sharegpt.jsonl.gz

writes decode.json, decode.md and decode.png. The protocol is the paper's: ShareGPT queries one by one, 200 new tokens each,
Llama-2-7B shapes in bf16, E=8, R=64, k=2; the weights are random, so only the lengths of the prompts count. Everything that
is measured runs in a process of its own, and leaves what it found in --out as part-*.json, from which the three files
are made. The parts can run at different times, and parts of parts, by the names that they print:

    python -m benchmarks.decode --out OUT --part jax --only backbone golden switch-qv
    python -m benchmarks.decode --out OUT --part merge          # measures nothing

    jax     ceilings; the backbone, and every strategy of the engine, with q, v and with all 7 linears adapted
    methods the methods that AdaFuse is compared with, in the same engine
    context a step by the length of its context, to the model's longest
    layer   one adapted layer: its backbone part and its adapter part, over rank and sequence length
    devices a step of one row on one GPU, and on two that share the model
    hf, peft, moe    the peers, see `benchmarks.peers_torch`
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adafuse_jax.adapters.presets import PRESETS
from benchmarks.decode_costs import SIZES, Shapes
from benchmarks.decode_report import EXTRA, merge_parts

PARTS = ("jax", "methods", "context", "layer", "devices", "hf", "peft", "moe")
ONE_ROW = ("golden", "switch", "simple")
"""Strategies that merge one row's experts into the weights, and so decode one row at a time."""
METHODS = (
    ("lora", "all7", "unmerged"), ("lora", "all7", "merged"), ("moral", "qv", "unmerged"), ("moral", "all7", "unmerged"),
    ("moral", "all7", "simple"), ("mola", "all7", "unmerged"), ("pesc", "-", "unmerged"),
)  # fmt: skip
"""(method, targets, strategy) of the part `methods`; AdaFuse's own simple merge is in `jax`."""
BYTES_PER_TOKEN = 4
RANDOM_PROMPT = 128


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process: `rows` are the places in the tables that it fills."""

    name: str
    module: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def place(method: str, targets: str, strategy: str = "-", batch: int = 1) -> dict[str, Any]:
    return {"method": method, "targets": targets, "strategy": strategy, "batch": batch}


def rows_job(name: str, method: str, targets: str, strategy: str, batches: list[int]) -> Job:
    settings = {"kind": "rows", "method": method, "strategy": strategy, "targets": targets, "batches": batches}
    rows = [place(method, targets, strategy, batch) for batch in batches]
    return Job(name=name, module="benchmarks.decode_rows", settings=settings, rows=rows)


def jobs_of(part: str, arguments: argparse.Namespace) -> list[Job]:
    rows_module, peers_module = "benchmarks.decode_rows", "benchmarks.peers_torch"
    if part == "layer":
        lengths, ranks = ([1, 16], [4, 8]) if arguments.size == "tiny" else ([1, 128, 512, 2048], [8, 16, 32, 64, 128])
        settings = {"kind": "layer", "ranks": ranks, "lengths": lengths, "seconds": 0.2}
        return [Job(name="layer", module=rows_module, settings=settings)]
    if part == "context":
        contexts = [16, 64] if arguments.size == "tiny" else [128, 472, 984, 2008, 4056]
        return [Job(name="context", module=rows_module, settings={"kind": "contexts", "contexts": contexts})]
    if part == "devices":
        settings = {"kind": "devices", "devices": [1, 2], "context": 16 if arguments.size == "tiny" else 236}
        return [Job(name="devices", module=rows_module, settings=settings)]
    if part == "jax":
        jobs = [Job(name="ceilings", module=rows_module, settings={"kind": "ceilings", "seconds": 0.3})]
        strategies = [s for s in PRESETS["adafuse"].strategies if s not in ONE_ROW] + list(ONE_ROW)
        batches = sorted(arguments.batches)
        jobs += [rows_job("backbone", "backbone", "-", "-", batches)]
        jobs += [rows_job("backbone-unmerged", "backbone", "-", "unmerged", batches)]
        for strategy in strategies:
            some = [b for b in batches if b == 1 or strategy not in ONE_ROW]
            jobs += [
                rows_job(f"{strategy}-{targets}", "adafuse", targets, strategy, some) for targets in ("qv", "all7")
            ]
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
        jobs.append(Job(name=name, module=peers_module, settings=settings, rows=rows))
    return jobs


def conversation_texts(path: Path) -> list[str]:
    """The first message of the user in every conversation, ShareGPT's `conversations` or chat `messages`."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        content = file.read()
    if content.lstrip().startswith("["):
        table = json.loads(content)
    else:
        table = [json.loads(line) for line in content.split("\n") if line.strip()]
    found = []
    for row in table:
        turns = row.get("conversations") or row.get("messages") or []
        said = (
            t.get("value") or t.get("content") for t in turns if (t.get("from") or t.get("role")) in ("human", "user")
        )
        found.append(next(said, None))
    return [text for text in found if text]


def make_prompts(arguments: argparse.Namespace, shapes: Shapes) -> tuple[list[list[int]], int, str]:
    """Random tokens, as many as the conversations' first messages have, and a phrase that says so; some more, if need
    be, so that no batch has a prompt twice."""
    rng = np.random.default_rng(0)
    most = shapes.max_position_embeddings - arguments.new_tokens
    if arguments.conversations is None:
        lengths = [min(RANDOM_PROMPT, most)] * arguments.queries
        description = f"{arguments.queries} random prompts of {lengths[0]} tokens"
    else:
        low, high = arguments.prompt_tokens
        texts = conversation_texts(arguments.conversations)
        counts = [math.ceil(len(text.encode()) / BYTES_PER_TOKEN) for text in texts]
        lengths = [n for n in counts if low <= n <= min(high, most)][: arguments.queries]
        if not lengths:
            raise SystemExit(
                f"--conversations {arguments.conversations}: none of its {len(texts)} questions has {low} to {high} tokens"
            )
        description = (
            f"{len(lengths)} prompts as long as the first questions of {arguments.conversations.name} that have {low} to "
            f"{high} tokens ({BYTES_PER_TOKEN} bytes each), {sum(lengths) / len(lengths):.0f} on average"
        )
    count = max(len(lengths), *arguments.batches)
    return (
        [rng.integers(3, shapes.vocab_size, lengths[i % len(lengths)]).tolist() for i in range(count)],
        len(lengths),
        description,
    )


def run_job(job: Job, common: dict[str, Any], timeout: float, python: str) -> tuple[dict[str, Any], str | None]:
    """The results that the process reported until it ended, and what went wrong, if anything did."""
    print(f"{job.name}:", flush=True)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        order, result, log = (Path(scratch) / name for name in ("job.json", "result.json", "stderr"))
        order.write_text(json.dumps(common | job.settings))
        command = [python, "-m", job.module, "--job", str(order), "--result", str(result)]
        problem = None
        with log.open("w") as errors:
            try:
                done = subprocess.run(command, stderr=errors, timeout=timeout)
                if done.returncode:
                    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                    problem = (lines or [f"exit code {done.returncode}"])[-1][:300]
                    print("\n".join(lines[-30:]), flush=True)
            except subprocess.TimeoutExpired:
                problem = f"stopped after {timeout:.0f} s"
        found = json.loads(result.read_text()) if result.exists() else {}
    print(f"  {time.perf_counter() - begun:.0f} s{f', {problem}' if problem else ''}", flush=True)
    return found, problem


def run_part(part: str, arguments: argparse.Namespace, command: str) -> None:
    """Measure, and keep part-*.json up to date."""
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
    name = "-".join(["part", part, *(arguments.only or ())])
    found: dict[str, Any] = {
        "part": part, "command": command, "size": arguments.size, "prompts": description, "versions": {}, "rows": [],
    }  # fmt: skip
    common = {
        "size": arguments.size, "prompts": prompts, "new_tokens": arguments.new_tokens, "queries": queries,
        "batch_queries": arguments.batch_queries, "row_seconds": arguments.row_seconds,
        "compile_seconds": arguments.compile_seconds,
    }  # fmt: skip
    python = arguments.torch_python if part in ("hf", "peft", "moe") else sys.executable
    for job in jobs:
        result, problem = run_job(job, common, arguments.job_seconds, python)
        for fact in ("jax", "torch", "transformers"):
            found["versions"] |= {fact: result[fact]} if fact in result else {}
        found |= {key: result[key] for key in ("device", "ceilings", *EXTRA) if key in result}
        rows = result.get("rows", [])
        there = [{key: row[key] for key in place("", "")} for row in rows]
        rows += [row | {"error": problem or "no result"} for row in job.rows if row not in there]
        found["rows"] += rows
        if problem and not job.rows:
            found.setdefault("problems", []).append(f"{job.name}: {problem}")
        found["finished"] = time.time()
        (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the parts and of decode.json, .md, .png")
    parser.add_argument(
        "--conversations", type=Path, help="JSON or JSONL (.gz) of conversations; default: random prompts"
    )
    parser.add_argument("--queries", type=int, default=50, help="prompts, decoded one by one")
    parser.add_argument("--new-tokens", type=int, default=200, help="tokens decoded after each")
    parser.add_argument("--part", choices=("all", *PARTS, "merge"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the part's jobs, those that begin with a name")
    parser.add_argument("--forms", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
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
    parser.add_argument("--size", choices=SIZES, default="llama2-7b")
    parser.add_argument("--torch-python", default=sys.executable, help="the Python that has torch and transformers")
    arguments = parser.parse_args(argv)
    if min(arguments.queries, arguments.batch_queries, *arguments.batches) < 1 or arguments.new_tokens < 2:
        parser.error("--queries, --batch-queries and --batches must be at least 1, and --new-tokens at least 2")
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.decode", *argv])
    for part in PARTS if arguments.part == "all" else () if arguments.part == "merge" else (arguments.part,):
        run_part(part, arguments, command)
    print(merge_parts(arguments.out), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
