"""Pictures of the study from its records: accuracy against decoding cost, and expert use by set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from studies.accuracy.study import best_rate, grid_of
from studies.accuracy.tasks import SETS

DECODING = Path("benchmarks/results/nvidia_h200/decode.json")
ROWS = {
    "lora": ("lora", "all7", "merged"), "adafuse": ("adafuse", "all7", "fused"), "mola": ("mola", "all7", "unmerged"),
    "moral": ("moral", "all7", "unmerged"),
}  # fmt: skip
"""Kind of an arm → (method, targets, strategy) of the row of the decode benchmark that it decodes like: 7B shapes, rank 64,
k = 2, one prompt. A variant with the routing known before layer 0 counts as AdaFuse; MoRAL adapts all 7 linears there
and the FFN alone in this study."""


def kind_of(arm: str) -> str:
    return "lora" if arm.startswith(("lora", "rslora")) else arm if arm in ROWS else "adafuse"


def milliseconds() -> dict[str, float]:
    """Kind → ms per token, from the record of the decode benchmark."""
    rows = json.loads(DECODING.read_text(encoding="utf-8"))["rows"]
    found = {(r["method"], r["targets"], r["strategy"]): r["ms_per_token"] for r in rows if r["batch"] == 1}
    return {kind: found[row] for kind, row in ROWS.items()}


def draw(records: Mapping[str, dict[str, Any]], out: Path) -> list[Path]:
    """Write OUT_cost.png, and OUT_use.png if expert use is recorded. Returns the files."""
    cost = out.with_name(out.stem + "_cost.png")
    _cost(_means(records), cost)
    use = {arm: replica["use"] for arm, replica in _best(records).items() if "use" in replica}
    if not use:
        return [cost]
    shares = out.with_name(out.stem + "_use.png")
    _use(use, shares)
    return [cost, shares]


def _best(records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arm → its replica at the best learning rate of its grid."""
    arms = sorted({r["run"]["arm"] for r in records.values()})
    rates = {arm: best_rate(records, arm) for arm in arms}
    return {arm: grid_of(records, arm)[rate] for arm, rate in rates.items() if rate is not None}


def _means(records: Mapping[str, dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Arm → (mean score over its seeds, how many), or that of its best learning rate, one seed."""
    found = {arm: (float(replica["mean"]), 1) for arm, replica in _best(records).items()}
    for record in records.values():
        if record["run"]["stage"] == "seeds":
            means = [replica["mean"] for replica in record["replicas"] if not replica["diverged"]]
            if means:
                found[record["run"]["arm"]] = (float(np.mean(means)), len(means))
    return found


def _cost(means: Mapping[str, tuple[float, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes, times = figure.subplots(), milliseconds()
    for kind, time in times.items():
        here = sorted((arm for arm in means if kind_of(arm) == kind), key=lambda arm: means[arm][0])
        below = -np.inf
        for arm in here:
            mean, seeds = means[arm]
            axes.plot(time, mean, "o", color="tab:blue", fillstyle="full" if seeds > 1 else "none")
            below = max(mean, below + 0.35)
            side, align = (-0.08, "right") if kind == "lora" else (0.08, "left")
            axes.annotate(arm, (time, mean), (time + side, below), fontsize=7, va="center", ha=align)
    axes.set(xlabel="ms per token, 7B shapes, one prompt (H200)", ylabel="mixture's mean, points", xlim=(3, 10))
    axes.set_title("Full: mean over seeds; open: one seed")
    figure.savefig(path, dpi=120)


def _use(use: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(use), 3.2), layout="constrained")
    for axes, (arm, shares) in zip(figure.subplots(1, len(use), squeeze=False)[0], use.items(), strict=True):
        axes.imshow([shares[name] for name in SETS], aspect="auto", vmin=0, cmap="viridis")
        axes.set_yticks(range(len(SETS)), SETS, fontsize=7)
        axes.set_title(arm, fontsize=8)
        axes.set_xlabel("expert")
    figure.savefig(path, dpi=120)
