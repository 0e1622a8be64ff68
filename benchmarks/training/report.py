"""training.json, training.md and training.png from the parts that `benchmarks.training` has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.records import write_json
from benchmarks.common.reports import number, picture, table

KEYS = (
    "size", "method", "targets", "batch", "length", "remat", "unroll", "segments", "devices", "mesh", "products",
    "accum",
)  # fmt: skip
REACHABLE_FLOPS = {"NVIDIA H200": 790e12}
"""FLOP/s that products of random bf16 matrices reach, the denominator of `mfu_4n_pct`. That of `train.py`'s MFU is the peak
that the vendor names, 989 TFLOP/s."""
CURVE_TOLERANCE = 1e-4
"""In nats, in float32 over 20 steps."""
MESH_TOLERANCE, ROUNDING = 5e-3, 2.0
"""Losses over several devices may differ from one device's by so many nats, in bfloat16: sums over devices are in another
order. Or by so many times what rounding alone moves them, where that was measured."""


def merge_parts(out: Path) -> str:
    """Write the three files from training-part-*.json in `out`; of a row measured twice the later one counts.

    Returns the report.
    """
    parts = [json.loads(path.read_text()) for path in out.glob("training-part-*.json")]
    parts.sort(key=lambda part: part["finished"])
    rows: dict[tuple, dict[str, Any]] = {}
    curve: dict[str, Any] | None = None
    for part in parts:
        curve = part.get("curve", curve)
        for row in part["rows"]:
            rows[tuple(row.get(key) for key in KEYS)] = finished(row, part.get("device"))
    record: dict[str, Any] = {
        "commands": [part["command"] for part in parts], "commits": sorted({str(part["commit"]) for part in parts}),
        "devices": sorted({part["device"] for part in parts if "device" in part}),
        "versions": {name: version for part in parts for name, version in part["versions"].items()},
        "curve": curve, "rows": list(rows.values()),
    }  # fmt: skip
    write_json(out / "training.json", record)
    text = report(record)
    (out / "training.md").write_text(text + "\n", encoding="utf-8")
    plot(record["rows"], out / "training.png")
    return text


def finished(row: dict[str, Any], device: str | None) -> dict[str, Any]:
    """A row with its spread in tokens/s and its share of the device's products by 4N: forward and activation gradients of a
    frozen backbone."""
    if "ms" not in row:
        return row
    found = dict(row)
    found["spread"] = row["tokens_per_second"] * row["spread_ms"] / row["ms"]
    peak, flops = REACHABLE_FLOPS.get(device or ""), row.get("flops_4n")
    found["mfu_4n_pct"] = 100 * flops / (row["ms"] / 1e3) / (peak * row["devices"]) if peak and flops else None
    return found


def report(record: dict[str, Any]) -> str:
    lines = [f"# Training speed: {', '.join(record['devices']) or 'no device'}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    lines += [f"{versions}. Made by:", "", *(f"    {command}" for command in record["commands"]), ""]
    lines += [*curve_lines(record["curve"]), ""]
    lines += [*mesh_lines(record["rows"]), ""]
    head = (
        "method", "shapes", "B × T", "segments", "remat", "layers", "products", "tokens/s", "± ",
        "of peak by 4N", "peak GiB", "compiled in", "error",
    )  # fmt: skip
    lines += table(head, [cells(row) for row in record["rows"]])
    kinds = [row for row in record["rows"] if row.get("profile")]
    if kinds:
        lines += ["", "Milliseconds of a step by kind of kernel:", ""]
        names = sorted({kind for row in kinds for kind in row["profile"][0]})
        lines += table(
            ("row", *names),
            [(name_of(row), *(number(row["profile"][0].get(kind), ".0f") for kind in names)) for row in kinds],
        )
    return "\n".join(lines)


def curve_lines(curve: dict[str, Any] | None) -> list[str]:
    if curve is None:
        return ["Losses were not compared with PEFT's."]
    if "error" in curve:
        return [f"Losses could not be compared with PEFT's: {curve['error']}"]
    differences = curve["ours"]["differences"]
    worst = max(differences, key=lambda form: differences[form])
    verdict = "agree with" if differences[worst] < CURVE_TOLERANCE else "DIFFER FROM"
    return [
        f"Losses of LoRA over {len(curve['peft']['losses'])} steps of a small model in float32 {verdict} PEFT's, from the "
        f"same weights, data and optimiser: at most {differences[worst]:.1e} nats apart ({worst})."
    ]


def mesh_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Two lines for every row over several devices: its speed over that of one device with a device's part of the batch, and
    its losses beside those of one device with the same batch."""
    return [
        line
        for row in rows
        if row["devices"] > 1 and "losses" in row
        for line in (speed_line(row, rows_of_one(row, rows)), losses_line(row, rows_of_one(row, rows)))
    ]


def rows_of_one(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one device that differ from `row` in the batch alone, the largest micro-batches first."""
    same = ("size", "method", "targets", "length", "remat", "unroll", "segments")
    found = [
        r
        for r in rows
        if r["devices"] == 1 and "losses" in r and all(r[key] == row[key] for key in same) and "mesh" in r
    ]
    return sorted(found, key=lambda r: -r["batch"])


def speed_line(row: dict[str, Any], alone: list[dict[str, Any]]) -> str:
    of_device = row["tokens_per_second"] / row["devices"]
    text = f"{name_of(row)}: {of_device:,.0f} tokens/s per device"
    if "flops_4n" in row:
        text += f", {row['flops_4n'] / row['ms'] / row['devices'] / 1e9:.0f} TFLOP/s per device by 4N"
    if part := [r for r in alone if r["batch"] * row["devices"] == row["batch"] and r.get("accum", 1) == 1]:
        text += f", {row['tokens_per_second'] / part[0]['tokens_per_second']:.2f}× one device"
    return f"{text}, peak {number(row.get('peak_gib'), '.1f')} GiB per device."


def losses_line(row: dict[str, Any], alone: list[dict[str, Any]]) -> str:
    """Two ways to divide the batch on one device differ by rounding alone, which moves losses further with every step."""

    def off(one: dict[str, Any], other: dict[str, Any]) -> float:
        return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=False))

    same = [r for r in alone if r["batch"] * r.get("accum", 1) == row["batch"]]
    if not same:
        return f"Losses of {name_of(row)}: not compared, one device has not run the same batch."
    one, *others = same
    rounding = max((off(one, other) for other in others), default=0.0)
    verdict = "agree with" if off(row, one) < max(MESH_TOLERANCE, ROUNDING * rounding) else "DIFFER FROM"
    text = f"Losses of {name_of(row)} {verdict} one device's: at most {off(row, one):.1e} nats apart"
    return text + (f", and its own with smaller micro-batches {rounding:.1e}." if others else ".")


def name_of(row: dict[str, Any]) -> str:
    form = {True: "unrolled", False: "scanned", None: ""}[row["unroll"]]
    packed = f"{row['segments']} segments" if row["segments"] > 1 else ""
    accum = f"×{row['accum']}" if row.get("accum", 1) > 1 else ""
    shape, mesh = f"B{row['batch']}{accum} T{row['length']}", row.get("mesh", "")
    products = "grouped" if row.get("products") == "grouped" else ""
    words = (row["method"], row["size"], shape, row["remat"], form, packed, products, mesh)
    return " ".join(word for word in words if word)


def cells(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        row["method"], " ".join(filter(None, (row["size"], row.get("mesh")))), f"{row['batch']} × {row['length']}",
        row["segments"], row["remat"],
        {True: "unrolled", False: "scanned", None: ""}[row["unroll"]], row.get("products", ""),
        number(row.get("tokens_per_second"), ",.0f"),
        number(row.get("spread"), ",.0f"), number(row.get("mfu_4n_pct"), ".0f", "%"), number(row.get("peak_gib"), ".1f"),
        number(row.get("compile_seconds"), ".0f", " s"), row.get("error", ""),
    )  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s of every row that was measured, by size of the model."""
    measured = [row for row in rows if "tokens_per_second" in row]
    sizes = sorted({row["size"] for row in measured}) or ["-"]
    with picture(path, nrows=len(sizes), figsize=(9, 1 + 0.5 * max(4, len(measured))), squeeze=False) as (figure, axes):
        for size, axis in zip(sizes, axes[:, 0], strict=True):
            some = [row for row in measured if row["size"] == size]
            axis.barh(
                [name_of(row).replace(f" {size}", "") for row in some], [row["tokens_per_second"] for row in some]
            )
            axis.invert_yaxis()
            axis.set_title(size)
            axis.set_xlabel("tokens/s")
        figure.tight_layout()
