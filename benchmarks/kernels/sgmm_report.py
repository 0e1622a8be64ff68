"""Tables and the roofline of `benchmarks.kernels.sgmm`, from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.reports import picture, table

MODES = ("golden", "switch")
MARKERS = "os^DvP*X"
HEAD = (
    "targets", "mode", "products", "implementation", "ms", "GB", "TB/s", "of copy", "over simple", "temporary GB",
    "max error", "relative error",
)  # fmt: skip


def log_line(row: dict[str, Any]) -> str:
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
        *table(HEAD, map(row_cells, result["rows"])),
    ]  # fmt: skip
    sweep = result["sweep"]
    ranks, top_ks = (sorted({row[key] for row in sweep}) for key in ("rank", "top_k"))
    for targets in dict.fromkeys(row["targets"] for row in sweep):
        for mode in dict.fromkeys(row["mode"] for row in sweep):
            title = f"## {sweep[0]['implementation']}, {mode}, {targets}: ms (TB/s, of copy; relative error)"
            cells = []
            for rank in ranks:
                place = {"targets": targets, "mode": mode, "rank": rank}
                cells.append([rank, *(sweep_cell(row) for row in sweep if place.items() <= row.items())])
            lines += ["", title, "", *table(["R", *(f"k = {k}" for k in top_ks)], cells)]
    return "\n".join(lines) + "\n"


def row_cells(row: dict[str, Any]) -> list[Any]:
    cells = [row["targets"], row["mode"], row["products"], row["implementation"]]
    if "ms" not in row:
        return [*cells, row.get("error", "WRONG")]
    cells += ["{ms:.3f} ± {spread_ms:.3f}".format(**row), "{gigabytes:.2f}".format(**row)]
    cells += ["{tb_per_s:.2f}".format(**row), "{percent_of_copy:.0f}%".format(**row)]
    cells += [f"{row['speedup_over_simple']:.1f}×" if "speedup_over_simple" in row else ""]
    return [*cells, "{temporary_gb:.3f}".format(**row), error_cell(row, "max"), error_cell(row, "relative")]


def error_cell(row: dict[str, Any], kind: str) -> str:
    return f"{row[f'{kind}_error']:.3g} ({row[f'{kind}_error_of_rounding']:.3g})"


def sweep_cell(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return row.get("error", "WRONG")
    return "{ms:.3f} ({tb_per_s:.2f}, {percent_of_copy:.0f}%; {relative_error:.2g})".format(**row)


def plot(result: dict[str, Any], path: Path) -> None:
    """The roofline, one panel for each mode and set of targets."""
    swept, targets = (
        result["sweep"][0]["implementation"],
        list(dict.fromkeys(row["targets"] for row in result["sweep"])),
    )
    top = 1.1 * max([result["ceilings"]["best_read"], *(row["tb_per_s"] for row in result["sweep"] if "ms" in row)])
    grid = {"nrows": len(targets), "ncols": 2, "figsize": (13, 9), "sharex": True, "sharey": True, "squeeze": False}
    with picture(path, dpi=130, **grid) as (figure, axes):
        for axis, (name, mode) in zip(axes.flat, ((t, m) for t in targets for m in MODES), strict=True):
            plot_ceilings(axis, result["ceilings"])
            plot_sweep(axis, [row for row in result["sweep"] if "ms" in row], name, mode)
            for row in result["rows"]:
                if "ms" in row and row["implementation"] != swept and (row["targets"], row["mode"]) == (name, mode):
                    plot_other(axis, row)
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


def plot_ceilings(axis: Any, ceilings: dict[str, Any]) -> None:
    intensity = np.geomspace(2, 600, 200)
    products = ceilings["best_matmul"] / intensity
    axis.plot(intensity, np.minimum(ceilings["best_copy"], products), color="black", label="copy, products")
    axis.axhline(ceilings["best_read"], color="gray", linestyle=":", label="read")


def plot_sweep(axis: Any, sweep: list[dict[str, Any]], targets: str, mode: str) -> None:
    """A colour for each rank, a marker for each k."""
    import matplotlib

    ranks, top_ks = (sorted({row[key] for row in sweep}) for key in ("rank", "top_k"))
    colors = dict(zip(ranks, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ranks))), strict=True))
    for rank in ranks:
        place = {"targets": targets, "mode": mode, "rank": rank}
        points = [row for row in sweep if place.items() <= row.items()]
        xs, ys = [row["flop_per_byte"] for row in points], [row["tb_per_s"] for row in points]
        axis.plot(xs, ys, color=colors[rank], label=f"R = {rank}")
        for row, x, y in zip(points, xs, ys, strict=True):
            axis.plot(x, y, MARKERS[top_ks.index(row["top_k"])], color=colors[rank], markersize=6)
    for top_k, marker in zip(top_ks, MARKERS, strict=False):
        axis.plot([], [], marker, color="gray", markersize=6, label=f"k = {top_k}")


def plot_other(axis: Any, row: dict[str, Any]) -> None:
    """A cross for an implementation that was not swept, with its name."""
    x, y = row["flop_per_byte"], row["tb_per_s"]
    axis.plot(x, y, "x", color="crimson")
    side = {"xytext": (7, 0)} if row["implementation"] == "xla" else {"xytext": (-7, 0), "ha": "right"}
    label = "{implementation}, R = {rank}, k = {top_k}".format(**row)
    axis.annotate(label, (x, y), textcoords="offset points", fontsize=8, va="center", color="crimson", **side)
