"""Tables and the roofline of `benchmarks.sgmm`, from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MODES = ("golden", "switch")
MARKERS = "os^DvP*X"


def in_words(row: dict[str, Any]) -> str:
    """One line of the log."""
    name = "{targets:5} {mode:10} {implementation:6} R={rank:<3} k={top_k}".format(**row)
    if "ms" not in row:
        return f"{name}  {row.get('error', 'WRONG')}"
    name += "  {ms:8.3f} ms ± {spread_ms:.3f}  {tb_per_s:.2f} TB/s  {percent_of_copy:.0f}% of copy".format(**row)
    return name + ("  {speedup_over_simple:.1f}× simple".format(**row) if "speedup_over_simple" in row else "")


def provenance(result: dict[str, Any]) -> str:
    return "{device}, JAX {jax}, `{command}`".format(**result)


def to_markdown(result: dict[str, Any]) -> str:
    """The tables."""
    ceilings = result["ceilings"]
    lines = [
        "# SGMM", "", f"{provenance(result)}, {result['size']}, bfloat16, {result['num_experts']} experts.", "",
        "Ceilings of this run: copy {best_copy:.2f} TB/s (read + write), read {best_read:.2f} TB/s, products "
        "{best_matmul:.0f} TFLOP/s.".format(**ceilings), "",
        "Time is the median of the repeats, ± their slowest less their fastest. Errors are against float64, on 64 rows of "
        "a layer; in brackets those of float64 rounded once to bfloat16.", "",
        "| targets | mode | products | implementation | ms | GB | TB/s | of copy | over simple | temporary GB | max error "
        "| relative error |", "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        cells = [row["targets"], row["mode"], row["products"], row["implementation"]]
        if "ms" in row:
            cells += ["{ms:.3f} ± {spread_ms:.3f}".format(**row), "{gigabytes:.2f}".format(**row)]
            cells += ["{tb_per_s:.2f}".format(**row), "{percent_of_copy:.0f}%".format(**row)]
            cells += [f"{row['speedup_over_simple']:.1f}×" if "speedup_over_simple" in row else ""]
            cells += ["{temporary_gb:.3f}".format(**row), error_cell(row, "max"), error_cell(row, "relative")]
        else:
            cells += [row.get("error", "WRONG").replace("|", "/"), *[""] * 7]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    sweep = result["sweep"]
    ranks, top_ks = (sorted({row[key] for row in sweep}) for key in ("rank", "top_k"))
    for targets in dict.fromkeys(row["targets"] for row in sweep):
        for mode in dict.fromkeys(row["mode"] for row in sweep):
            title = f"## {sweep[0]['implementation']}, {mode}, {targets}: ms (TB/s, of copy; relative error)"
            head = " | ".join(["R", *(f"k = {k}" for k in top_ks)])
            lines += ["", title, "", f"| {head} |", "|---" * (len(top_ks) + 1) + "|"]
            for rank in ranks:
                place = {"targets": targets, "mode": mode, "rank": rank}
                found = [row for row in sweep if place.items() <= row.items()]
                lines.append(f"| {rank} | {' | '.join(map(sweep_cell, found))} |")
    return "\n".join(lines) + "\n"


def error_cell(row: dict[str, Any], kind: str) -> str:
    return f"{row[f'{kind}_error']:.3g} ({row[f'{kind}_error_of_rounding']:.3g})"


def sweep_cell(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return row.get("error", "WRONG").replace("|", "/")
    return "{ms:.3f} ({tb_per_s:.2f}, {percent_of_copy:.0f}%; {relative_error:.2g})".format(**row)


def plot(result: dict[str, Any], path: Path) -> None:
    """The roofline, one picture for each mode and set of targets: a colour for each rank, a marker for each k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ceilings, sweep = result["ceilings"], [row for row in result["sweep"] if "ms" in row]
    swept = result["sweep"][0]["implementation"]
    targets = list(dict.fromkeys(row["targets"] for row in result["sweep"]))
    ranks, top_ks = (sorted({row[key] for row in sweep}) for key in ("rank", "top_k"))
    colors = dict(zip(ranks, plt.colormaps["viridis"](np.linspace(0, 0.9, len(ranks))), strict=True))
    figure, axes = plt.subplots(len(targets), 2, figsize=(13, 9), sharex=True, sharey=True, squeeze=False)
    top = 1.1 * max([ceilings["best_read"], *(row["tb_per_s"] for row in sweep)])
    intensity = np.geomspace(2, 600, 200)
    for axis, (name, mode) in zip(axes.flat, ((t, m) for t in targets for m in MODES), strict=True):
        compute = ceilings["best_matmul"] / intensity
        axis.plot(intensity, np.minimum(ceilings["best_copy"], compute), color="black", label="copy, products")
        axis.axhline(ceilings["best_read"], color="gray", linestyle=":", label="read")
        for rank in ranks:
            place = {"targets": name, "mode": mode, "rank": rank}
            points = [row for row in sweep if place.items() <= row.items()]
            xs, ys = [row["flop_per_byte"] for row in points], [row["tb_per_s"] for row in points]
            axis.plot(xs, ys, color=colors[rank], label=f"R = {rank}")
            for row, x, y in zip(points, xs, ys, strict=True):
                axis.plot(x, y, MARKERS[top_ks.index(row["top_k"])], color=colors[rank], markersize=6)
        for top_k, marker in zip(top_ks, MARKERS, strict=False):
            axis.plot([], [], marker, color="gray", markersize=6, label=f"k = {top_k}")
        others = [row for row in result["rows"] if "ms" in row and row["implementation"] != swept]
        for row in others:
            if (row["targets"], row["mode"]) != (name, mode):
                continue
            x, y = row["flop_per_byte"], row["tb_per_s"]
            axis.plot(x, y, "x", color="crimson")
            side = {"xytext": (7, 0)} if row["implementation"] == "xla" else {"xytext": (-7, 0), "ha": "right"}
            label = "{implementation}, R = {rank}, k = {top_k}".format(**row)
            axis.annotate(label, (x, y), textcoords="offset points", fontsize=8, va="center", color="crimson", **side)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(ylim=(0, top), title=f"{mode}, {name}")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("FLOP per byte")
    for axis in axes[:, 0]:
        axis.set_ylabel("TB/s, read + write")
    axes[0, 0].legend(fontsize=8, loc="lower left", ncols=2)
    figure.suptitle(f"SGMM by {swept}, {result['size']}, bfloat16\n{provenance(result)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
