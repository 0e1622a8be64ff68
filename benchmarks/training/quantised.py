"""Training on a quantised backbone: tokens/s and peak memory beside bfloat16, each row in a process of its own.

    python -m benchmarks.training.quantised --out OUT
    python -m benchmarks.training.quantised --out OUT --quantize int4 --method lora --rank 16 --batch 1 --length 512 \\
        --remat full --limit-gib 7 6      # under limits of the allocator

Shapes of Llama-2-7B by default, all 7 linears adapted, random weights and tokens. OUT/quantised_training.json has a row for
each setting, one that ran out of memory too, and is written after each. A row that was measured at the same commit is not
measured again, so a call that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adafuse_jax.models.quantised import LAYOUTS
from benchmarks.common.jobs import Job, run_job
from benchmarks.common.records import command_line, commit, write_json
from benchmarks.training.shapes import SHAPES

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def device_gib() -> float:
    """Memory of the first GPU, in GiB, without a process of JAX on it."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def settings_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of each row, which are its keys in the record."""
    common = {
        "size": arguments.size, "method": arguments.method, "rank": arguments.rank or SHAPES[arguments.size].rank,
        "targets": "all7", "batch": arguments.batch, "length": arguments.length, "remat": arguments.remat,
        "unroll": arguments.unroll, "segments": 1,
    }  # fmt: skip
    return [
        common | {"quantize": None if name == "none" else name, "limit_gib": limit}
        for name in arguments.quantize
        for limit in arguments.limit_gib or [None]
    ]


def measured(settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Results of a process, or its error."""
    if settings["limit_gib"] is not None:
        os.environ[FRACTION] = f"{settings['limit_gib'] / device_gib():.6f}"
    names = (settings["quantize"] or "bfloat16", settings["limit_gib"] and f"{settings['limit_gib']:g} GiB")
    job = Job(name=", ".join(filter(None, names)), module="benchmarks.training.rows", settings=settings)
    common = {"steps": arguments.steps, "repeats": arguments.repeats, "profile": False}
    found, problem = run_job(job, common, arguments.job_seconds, sys.executable)
    return found if "ms" in found else found | {"error": found.get("error") or problem or "no result"}


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row in words, its speed over that of bfloat16 with the same settings, if there is one."""
    name = row["quantize"] or "bfloat16"
    limit = "" if row["limit_gib"] is None else f" in {row['limit_gib']:g} GiB (allocator: {row.get('allocator_gib')})"
    planned = f"planned {row.get('planned_gib')} GiB"
    if "ms" not in row:
        return f"{name}{limit}: {row['error']}, {planned}"
    same = ("size", "method", "rank", "batch", "length", "remat", "unroll", "device")
    plain = [r for r in rows if r["quantize"] is None and "ms" in r and all(r[key] == row[key] for key in same)]
    over = ""
    if plain and row["quantize"] is not None:
        over = f", {row['tokens_per_second'] / plain[-1]['tokens_per_second']:.3f} of bfloat16's"
    speed = f"{row['tokens_per_second']:,.0f} tokens/s{over}, {row['ms']:.0f} ± {row['spread_ms']:.0f} ms"
    losses = f"loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
    return f"{name}{limit}: {speed}, peak {row['peak_gib']} GiB, {planned}, {losses}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of quantised_training.json")
    parser.add_argument("--quantize", nargs="+", choices=("none", *LAYOUTS), default=["none", "int8", "int4"])
    parser.add_argument("--size", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--method", choices=("adafuse", "lora"), default="adafuse")
    parser.add_argument("--rank", type=int, help="default: that of the shapes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--unroll", action="store_true")
    parser.add_argument("--limit-gib", nargs="+", type=float, help="limits of the allocator; default: the device's")
    parser.add_argument("--steps", type=int, default=4, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job-seconds", type=float, default=300, help="a process is stopped after these")
    arguments = parser.parse_args(argv)
    path = arguments.out / "quantised_training.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    command, now = command_line("benchmarks.training.quantised", argv), commit()
    for settings in settings_of(arguments):
        before = [row for row in rows if settings.items() <= row.items()]
        if found := [row for row in before if row["commit"] == now and "ms" in row]:
            print(f"{line(found[-1], rows)} (measured before)", flush=True)
            continue
        row = {"commit": now, "command": command} | settings | measured(settings, arguments)
        replaced = [old for old in before if "ms" in row or "ms" not in old]  # no error takes the place of a result
        rows = [old for old in rows if old not in replaced] + [row]
        write_json(path, {"rows": rows})
        print(line(row, rows), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
