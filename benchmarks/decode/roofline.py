"""Roofline of decoding by the type of the weights, made from the rows of decode.json: roofline.png and roofline.md.

    python -m benchmarks.decode.roofline --out benchmarks/results/nvidia_h200      # measures nothing

A point is a step of all rows of a batch: FLOPs over bytes, both computed (`costs`), and FLOPs over its time. The roof is
the lower of bytes at the measured read ceiling and the tensor cores' bfloat16 peak of the data sheet; codes become bfloat16
before they are multiplied, so that the peak is the same for all. Fewer bits move a point to the right: its roof is higher.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adafuse_jax.training.utilisation import PEAK_FLOPS
from benchmarks.common.reports import number, picture, table
from benchmarks.decode.costs import QUANTISED

PLAIN = "bf16"
COLORS = dict(zip((PLAIN, *QUANTISED), ("black", "tab:blue", "tab:orange", "tab:green"), strict=True))
MARKERS = {
    ("backbone", "fused"): "o",
    ("adafuse", "fused"): "s",
    ("backbone", "unmerged"): "^",
    ("adafuse", "unmerged"): "D",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A step. `roof_tflops`: the speed of its FLOPs at the limit that is nearer, which `bound` names."""

    method: str
    strategy: str
    weights: str
    batch: int
    intensity: float
    tflops: float
    roof_tflops: float
    bound: str


def points(result: dict[str, Any]) -> list[Point]:
    """The points of the bare backbone and of AdaFuse on all linears. Raises `SystemExit` where the record has no read
    ceiling, or is of a device whose peak is not known."""
    read, peak = result["ceilings"]["read_tbps"], PEAK_FLOPS.get(result["device"])
    if read is None or peak is None:
        raise SystemExit(f"decode.json of {result['device']} has no read ceiling, or the device's peak is not known")
    found = []
    for row in result["rows"]:
        strategy = "fused" if row["strategy"] == "-" else row["strategy"]
        kernel, _, weights = strategy.partition("-")
        is_shown = (row["method"], kernel) in MARKERS and row["targets"] in ("-", "all7")
        if not is_shown or row.get("ms_per_token") is None:
            continue
        flops = row["flops_g"] * row["batch"]
        intensity = flops / row["bytes_gb"]
        limits = {"reads": intensity * read, "products": peak / 1e12}
        bound = min(limits, key=lambda name: limits[name])
        found.append(Point(
            method=row["method"], strategy=kernel, weights=weights or PLAIN, batch=row["batch"], intensity=intensity,
            tflops=flops / row["ms_per_token"], roof_tflops=limits[bound], bound=bound,
        ))  # fmt: skip
    return found


def to_markdown(result: dict[str, Any], found: Sequence[Point]) -> str:
    head = "method", "strategy", "weights", "batch", "FLOP/byte", "TFLOP/s", "of the roof", "which is of"
    cells = [
        [p.method, p.strategy, p.weights, p.batch, number(p.intensity, ".1f"), number(p.tflops, ".1f"),
         number(100 * p.tflops / p.roof_tflops, ".0f", "%"), p.bound]
        for p in found
    ]  # fmt: skip
    about = f"{result['device']}, {result['size']}; read ceiling {result['ceilings']['read_tbps']:.2f} TB/s, measured."
    return "\n".join(["# Roofline of decoding", "", about, "", *table(head, cells)]) + "\n"


def plot(result: dict[str, Any], found: Sequence[Point], path: Path) -> None:
    read, peak = result["ceilings"]["read_tbps"], PEAK_FLOPS[result["device"]] / 1e12
    with picture(path, figsize=(8, 5.5), layout="constrained") as (figure, axis):
        left, right = min(p.intensity for p in found) / 1.5, max(2 * peak / read, *(1.5 * p.intensity for p in found))
        axis.plot([left, peak / read, right], [left * read, peak, peak], color="gray", label="reads, products")
        for (method, strategy), marker in MARKERS.items():
            for weights, color in COLORS.items():
                of_line = [p for p in found if (p.method, p.strategy, p.weights) == (method, strategy, weights)]
                of_line.sort(key=lambda p: p.batch)
                if of_line:
                    xs, ys = [p.intensity for p in of_line], [p.tflops for p in of_line]
                    axis.plot(xs, ys, marker=marker, color=color, linewidth=0.8, label=f"{method} {strategy} {weights}")
                    for p in of_line:
                        axis.annotate(
                            f"{p.batch}",
                            (p.intensity, p.tflops),
                            textcoords="offset points",
                            xytext=(5, -9),
                            fontsize=7,
                        )
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, loc="lower right")
        figure.suptitle(
            f"{result['device']}, {result['size']}: decoding by the type of the weights; numbers: rows of a batch",
            fontsize=9,
        )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of decode.json")
    arguments = parser.parse_args(argv)
    result = json.loads((arguments.out / "decode.json").read_text())
    found = points(result)
    if not found:
        raise SystemExit(f"{arguments.out}/decode.json has no row of the backbone or of AdaFuse on all linears")
    (arguments.out / "roofline.md").write_text(to_markdown(result, found))
    plot(result, found, arguments.out / "roofline.png")
    print(to_markdown(result, found))


if __name__ == "__main__":
    main(sys.argv[1:])
