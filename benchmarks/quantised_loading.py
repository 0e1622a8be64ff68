"""Time and memory of loading quantised exports beside the bfloat16 model that they were made of; random weights.

    python -m benchmarks.quantised_loading --work /tmp/loading --out benchmarks/results/nvidia_h200      # 22 GB of disk

Each load is in a process of its own, `--repeats` of each directory in turn, with the files in the page cache. What `--work`
holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adafuse_jax.models.quantised import LAYOUTS
from benchmarks.common.records import command_line, facts, write_json
from benchmarks.decode.costs import SIZES
from benchmarks.full_size import measure_import, run

PLAIN = "bfloat16"


def cached(directory: Path) -> None:
    """Read the files once."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def row_of(loads: Sequence[dict[str, Any]], plain: float | None) -> dict[str, Any]:
    """Medians of the seconds, their range, the peaks, and the share of the plain model's time."""
    seconds = [load["seconds"] for load in loads]
    median = statistics.median(seconds)
    row = {
        "seconds": median,
        "spread_seconds": round(max(seconds) - min(seconds), 2),
        "weights_gib": loads[0]["weights_gib"],
    }
    row |= {name: max(load[name] for load in loads) for name in ("peak_host_gib", "peak_device_gib")}
    return row | ({} if plain is None else {"of_plain": round(median / plain, 3)})


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the model and its exports")
    parser.add_argument("--out", type=Path, required=True, help="directory of quantised_loading.json")
    parser.add_argument("--size", choices=SIZES, default="llama2-7b")
    parser.add_argument("--quantize", nargs="+", choices=LAYOUTS, default=["int8", "int4"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.load is not None:
        print(json.dumps(measure_import(arguments.load)))
        return
    work, module = arguments.work, ["-m", "benchmarks.quantised_loading", "--work", "-", "--out", "-"]
    directories = {PLAIN: work / "model"} | {name: work / name for name in arguments.quantize}
    if not (work / "model" / "config.json").exists():
        paths = ["--work", str(work), "--out", str(arguments.out)]
        run(["-m", "benchmarks.full_size", "--size", arguments.size, *paths, "--only", "write"])
    for name in arguments.quantize:
        if not directories[name].exists():
            paths = ["--model", str(work / "model"), "--output", str(directories[name])]
            run(["-m", "adafuse_jax.export", *paths, "--quantize", name])
    loads: dict[str, list[dict[str, Any]]] = {name: [] for name in directories}
    for directory in directories.values():
        cached(directory)
    for _ in range(arguments.repeats):
        for name, directory in directories.items():
            loads[name].append(json.loads(run([*module, "--load", str(directory)])))
    plain = statistics.median(load["seconds"] for load in loads[PLAIN])
    rows = {name: row_of(of_name, None if name == PLAIN else plain) for name, of_name in loads.items()}
    record = {
        **facts(),
        "command": command_line("benchmarks.quantised_loading", argv),
        "size": arguments.size,
        "rows": rows,
    }
    write_json(arguments.out / "quantised_loading.json", record)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
