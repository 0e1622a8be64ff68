"""Preparation of a large data set: the first start, which builds the data cache, and a second, which reads it.

    python -m benchmarks.training.data --model SMOLLM2_DIR --alpaca ALPACA.json.gz --examples 100000 1000000 \
        --work /tmp/data --out benchmarks/results/cpu

The rows are made of Alpaca's: the instruction of one and the first 1000 characters of another's response. Each start is a
process of its own. Time is that of `prepare_data`; memory is the peak of the process, and of that what lies above its size
before.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.data import prepare_data
from benchmarks.common.jobs import Job, add_job_flags, reporter, run_job
from benchmarks.common.records import command_line, commit, write_json
from benchmarks.common.reports import table
from benchmarks.common.timing import Stopwatch

MODULE = "benchmarks.training.data"
TIMEOUT = 7200
REPLY_CHARACTERS = 1000
NUM_BATCHES = 100


def write_rows(alpaca: Path, examples: int, out: Path) -> None:
    """`examples` rows in Alpaca's format, the same for the same number."""
    with gzip.open(alpaca, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    rng = random.Random(0)
    with out.open("w", encoding="utf-8") as file:
        for _ in range(examples):
            asked, answered = rng.choice(rows), rng.choice(rows)
            row = {"instruction": asked["instruction"], "input": asked["input"]}
            file.write(json.dumps(row | {"output": answered["output"][:REPLY_CHARACTERS]}) + "\n")


def megabytes() -> dict[str, float]:
    """Resident size of this process now and at its peak, in MB; of files that are mapped, the pages that were read."""
    pages = [int(n) for n in Path("/proc/self/statm").read_text().split()]
    scale = resource.getpagesize() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"resident": pages[1] * scale, "mapped": pages[2] * scale, "peak": peak}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """One start: times in seconds, memory in MB, and the load of the machine before it."""
    logging.basicConfig(level=logging.WARNING)
    load = os.getloadavg()[0]
    tokenizer = load_tokenizer(settings["model"])
    config = TrainConfig(
        model=settings["model"],
        dataset=(settings["data"],),
        output="unused",
        data_cache=settings["cache"],
        batch_size=16,
    )
    before, watch = megabytes(), Stopwatch()
    data = prepare_data(config, tokenizer)
    seconds, after, watch = watch.seconds, megabytes(), Stopwatch()
    for step in range(NUM_BATCHES):
        data.batches.at(step)
    cpu = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "examples": settings["examples"],
        "seconds": seconds,
        "examples_per_second": settings["examples"] / seconds,
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in cpu),
        "memory_mb": {
            "before": before["resident"],
            "after": after["resident"],
            "beyond": after["peak"] - before["peak"],
        },
        "batch_ms": 1e3 * watch.seconds / NUM_BATCHES,
        "rows": data.batches.rows_per_epoch,
        "fingerprint": data.fingerprint,
        "load_before": load,
    }


def report(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    head = (
        "start",
        "examples",
        "time",
        "examples/s",
        "CPU time",
        "memory beyond the process",
        "a batch",
        "load before",
    )
    rows = [
        (
            f"{name} {size['cache_bytes'] / 1e9:.2g} GB", f"{start['examples']:,}", f"{start['seconds']:.1f} s",
            f"{start['examples_per_second']:,.0f}", f"{start['cpu_seconds']:.0f} s",
            f"{start['memory_mb']['beyond']:.0f} MB", f"{start['batch_ms']:.2f} ms", f"{start['load_before']:.1f}",
        )
        for size in record["sizes"]
        for name, start in size["starts"].items()
    ]  # fmt: skip
    origin = f"{record['processors']} processors, commit {record['commit']}: `{record['command']}`"
    return "\n".join([f"# Preparation of data\n\n{origin}\n", *table(head, rows), ""])


def measured(arguments: argparse.Namespace, examples: int) -> dict[str, Any]:
    """Both starts with a data set of so many examples. Ends the program if one fails."""
    data, cache = arguments.work / f"{examples}.jsonl", arguments.work / f"cache-{examples}"
    write_rows(arguments.alpaca, examples, data)
    shutil.rmtree(cache, ignore_errors=True)
    settings = {"model": arguments.model, "data": str(data), "cache": str(cache), "examples": examples}
    starts = {}
    for name in ("first, builds", "second, reads"):
        job = Job(name=f"{examples} examples: {name}", module=MODULE, settings=settings)
        starts[name], problem = run_job(job, {}, TIMEOUT, sys.executable)
        if problem:
            sys.exit(f"{job.name}: {problem}")
    if len({start["fingerprint"] for start in starts.values()}) > 1:
        sys.exit(f"{examples} examples: the second start has other rows than the first")
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {"examples": examples, "data_bytes": data.stat().st_size, "cache_bytes": size, "starts": starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory with the tokenizer, SmolLM2-135M-Instruct")
    parser.add_argument("--alpaca", type=Path, help="alpaca_en_demo.json.gz")
    parser.add_argument("--examples", type=int, nargs="+", default=[100_000, 1_000_000], help="rows of the data sets")
    parser.add_argument("--work", type=Path, help="directory for data sets and caches")
    parser.add_argument("--out", type=Path, help="directory for data.json and data.md")
    add_job_flags(parser, required=False)
    arguments = parser.parse_args()
    if arguments.job is not None:
        reporter(arguments.result, {})(measure(json.loads(arguments.job.read_text())))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "command": command_line(MODULE),
        "commit": commit(),
        "processors": len(os.sched_getaffinity(0)),
        "sizes": [],
    }
    for examples in arguments.examples:
        record["sizes"].append(measured(arguments, examples))
        write_json(arguments.out / "data.json", record)
        (arguments.out / "data.md").write_text(report(record), encoding="utf-8")


if __name__ == "__main__":
    main()
