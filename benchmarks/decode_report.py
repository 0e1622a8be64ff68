"""decode.json, decode.md and decode.png from what the parts of `benchmarks.decode` left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.decode_costs import SIZES, Shapes, costs

KEY = ("method", "targets", "strategy", "batch")
FIELDS = (
    *KEY, "ms_per_token", "spread_ms", "overhead_pct", "bytes_gb", "read_bandwidth_pct", "peak_gib", "params_b", "flops_g",
)  # fmt: skip
EXTRA = ("breakdown", "contexts", "devices")
"""Lists of a part that are tables of their own; one measured later stands for those before."""
METHODS = ("backbone", "adafuse", "lora", "moral", "mola", "pesc")
STRATEGIES = ("-", "fused", "unmerged", "golden", "switch", "simple", "merged")
PEERS = ("hf", "hf-compiled", "peft-lora", "peft-lora-compiled", "lora-moe", "lora-moe-compiled")
NOTES = (
    "ms/token is the time of a step after the first token, which prefill makes: a token of every row of the batch. It is "
    "the median over the queries, ± their slowest less their fastest. Compilation is in none of the times.",
    "Bytes are computed, per step: weights, norms and head, the cache up to its mean length, the factors of the experts in "
    "use, and what a merge writes and reads again. The share of the read bandwidth is these bytes over the time.",
    "Over backbone: over the row of the same batch without an adapter, which is one launch where that can run; of unmerged "
    "and simple, over the one that is single operations as they are; of a peer, over hf in the same form.",
    "Our rows decode greedily among the tokens that the text does not have yet, through Engine.generate, which hands every "
    "token to the host; the peers take the likeliest token and hand over none.",
    "Peak memory includes prefill; of our rows it is the process's from its start, of the peers that of the timed queries.",
    "FLOPs are per token of one row; a merge counts its products B A.",
)


def read_parts(out: Path) -> list[dict[str, Any]]:
    """The parts, oldest first."""
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("part-*.json"))]
    if not parts:
        raise SystemExit(f"{out} holds no part-*.json; measure a part first")
    sizes = sorted({part["size"] for part in parts})
    if len(sizes) > 1:
        raise SystemExit(
            f"{out} holds parts of different sizes ({', '.join(sizes)}); give each size a directory of its own"
        )
    return sorted(parts, key=lambda part: part["finished"])


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEY)


def name_of(row: dict[str, Any]) -> str:
    """Method, targets and strategy, as far as it has them."""
    return " ".join(row[key] for key in KEY[:3] if row[key] != "-")


def rank_of(row: dict[str, Any]) -> tuple[int, ...]:
    """The order of the tables."""
    first = (*METHODS, *PEERS).index(row["method"]), STRATEGIES.index(row["strategy"])
    return *first, ("-", "qv", "all7").index(row["targets"]), row["batch"]


def baseline_of(row: dict[str, Any]) -> tuple[Any, ...]:
    if row["method"] in PEERS:
        return "hf-compiled" if row["method"].endswith("-compiled") else "hf", "-", "-", 1
    single = row["strategy"] in ("unmerged", "simple")
    return "backbone", "-", "unmerged" if single else "-", row["batch"]


def complete(
    row: dict[str, Any], rows: dict[tuple[Any, ...], dict[str, Any]], shapes: Shapes, read: float | None
) -> Any:
    """`FIELDS` of a measured row, None where there is nothing to say."""
    place = {key: row[key] for key in KEY}
    full: dict[str, Any] = dict.fromkeys(FIELDS) | place
    cost = costs(shapes, **place, context=row.get("context", 0), distinct=row.get("distinct_experts"))
    full |= {"params_b": cost.params_b}
    if "ms_per_token" not in row:
        return full
    ms, base = row["ms_per_token"], rows.get(baseline_of(row), {}).get("ms_per_token")
    full |= {"ms_per_token": ms, "spread_ms": row["spread_ms"], "peak_gib": row.get("peak_gib")}
    full |= {"bytes_gb": cost.bytes_gb, "flops_g": cost.flops_g}
    full["overhead_pct"] = None if base is None else 100 * (ms / base - 1)
    full["read_bandwidth_pct"] = None if read is None else 100 * cost.bytes_gb / ms / read
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in full.items()}


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """decode.json. A row measured twice counts as it was measured last, ceilings count as they were highest."""
    shapes = SIZES[parts[0]["size"]]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        for row in part["rows"]:
            if "error" not in row or "error" in rows.get(key_of(row), row):
                rows[key_of(row)] = row
    ways = [part["ceilings"] for part in parts if "ceilings" in part]
    ceilings = {name: max((way[name] for way in ways), default=None) for name in ("read_tbps", "copy_tbps")}
    ordered = sorted(rows.values(), key=rank_of)
    finished = {key_of(row): complete(row, rows, shapes, ceilings["read_tbps"]) for row in ordered}
    versions = {name: version for part in parts for name, version in part["versions"].items()}
    extras = [{k: v for k, v in row.items() if k in KEY or k not in FIELDS} for row in ordered]
    commands, prompts = (list(dict.fromkeys(part[name] for part in parts)) for name in ("command", "prompts"))
    tables: dict[str, list[Any]] = {
        name: next((part[name] for part in reversed(parts) if name in part), []) for name in EXTRA
    }
    notes = [*(f"Prompts: {text}." for text in prompts), *NOTES]
    for way in ways[-1:]:
        speeds = (f"{kind} by {name} {speed:.2f}" for kind in ("read", "copy") for name, speed in way[kind].items())
        notes.append(f"Ceilings, TB/s: {', '.join(speeds)}.")
    notes += [problem for part in parts for problem in part.get("problems", [])]
    return {
        "device": next((part["device"] for part in reversed(parts) if "device" in part), None),
        "jax": versions.pop("jax", None),
        **versions,
        "command": "; ".join(commands),
        "size": shapes.name,
        "num_experts": shapes.num_experts, "rank": shapes.rank, "top_k": shapes.top_k,
        "ceilings": ceilings,
        "rows": [row for key, row in finished.items() if key[0] not in PEERS],
        "peers": [row for key, row in finished.items() if key[0] in PEERS],
        **tables,
        "details": extras,
        "notes": notes,
    }  # fmt: skip


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: list[dict[str, Any]], details: dict[tuple[Any, ...], dict[str, Any]]) -> list[str]:
    """Lines of one table; a row that failed says why."""
    head = (
        "method", "targets", "strategy", "batch", "ms/token", "over backbone", "GB/token", "of read", "peak GiB",
        "parameters, B", "GFLOP/token", "prefill ms", "queries × tokens",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        more = details[key_of(row)]
        cells = [str(row[key]) for key in KEY]
        if row["ms_per_token"] is None:
            cells += [
                more.get("error", "not measured").replace("|", "/"),
                *[""] * 4,
                number(row["params_b"], ".3f"),
                "",
                "",
                "",
            ]
        else:
            cells += [f"{row['ms_per_token']:.3f} ± {row['spread_ms']:.3f}", number(row["overhead_pct"], "+.1f")]
            cells[-1] += "%" if cells[-1] else ""
            cells += [number(row["bytes_gb"], ".2f"), number(row["read_bandwidth_pct"], ".0f")]
            cells[-1] += "%" if cells[-1] else ""
            cells += [number(row["peak_gib"], ".1f"), number(row["params_b"], ".3f"), number(row["flops_g"], ".1f")]
            cells += [number(more.get("prefill_ms"), ".1f"), f"{more['queries']} × {more['new_tokens']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def layer_table(breakdown: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| tokens | R | bare layer, ms | AdaFuse adds, ms | | layer-wise adds, ms | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(breakdown, key=lambda row: (row["length"], row["rank"])):
        cells = [str(row["length"]), str(row["rank"]), f"{row['backbone_ms']:.4f}"]
        for name in ("adafuse", "layerwise"):
            added = row.get(f"{name}_ms")
            if added is None:
                cells += [row.get(f"{name}_error", "not measured").replace("|", "/"), ""]
            else:
                cells += [f"{added:.4f}", f"{100 * added / row['backbone_ms']:+.1f}%"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def context_table(contexts: list[dict[str, Any]], read: float | None) -> list[str]:
    lines = [
        "| | tokens in the cache | ms | GB | of read | more than the shortest, ms | its bytes' own, ms |",
        "|---" * 7 + "|",
    ]
    first: dict[str, Any] = {}
    for row in contexts:
        start = first.setdefault(row["method"], row)
        share = bytes_ms = None
        if read is not None:
            share, bytes_ms = 100 * row["bytes_gb"] / row["ms"] / read, (row["bytes_gb"] - start["bytes_gb"]) / read
        cells = [name_of(row), str(row["context"]), f"{row['ms']:.3f}"]
        cells += [f"{row['bytes_gb']:.2f}", number(share, ".0f") + "%" * (share is not None)]
        cells += [f"{row['ms'] - start['ms']:.3f}", number(bytes_ms, ".3f")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def device_table(rows: list[dict[str, Any]]) -> list[str]:
    """Each step beside that of one device by default, and by the same strategy."""
    lines = ["| | GPUs | ms | speed over one, its default | over one, the same strategy |", "|---" * 5 + "|"]
    for row in rows:
        alone = [r for r in rows if r["devices"] == 1 and r["method"] == row["method"]]
        same = next((r for r in alone if r["strategy"] == row["strategy"]), None)
        cells = [name_of(row), str(row["devices"]), f"{row['ms']:.3f}"]
        cells += [f"{base['ms'] / row['ms']:.2f}×" if base else "" for base in (alone[0] if alone else None, same)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def provenance(result: dict[str, Any]) -> str:
    software = ", ".join(f"{name} {result[name]}" for name in ("jax", "torch", "transformers") if result.get(name))
    experts = "E={num_experts}, R={rank}, k={top_k}".format(**result)
    return f"{result['device']}, {software}; {result['size']}, bf16, {experts}"


def to_markdown(result: dict[str, Any]) -> str:
    details = {key_of(row): row for row in result["details"]}
    read, copied = result["ceilings"]["read_tbps"], result["ceilings"]["copy_tbps"]
    lines = ["# Decoding", "", f"{provenance(result)}. `{result['command']}`", ""]
    if read is not None:
        lines += [f"Ceilings of this GPU: read {read:.2f} TB/s, copy {copied:.2f} TB/s (read + write).", ""]
    for title, rows in (("AdaFuse-JAX", result["rows"]), ("Peers in torch", result["peers"])):
        if rows:
            lines += [f"## {title}", "", *table(rows, details), ""]
    if result["contexts"]:
        lines += ["## Longer contexts, batch 1, steps alone", "", *context_table(result["contexts"], read), ""]
    if result["devices"]:
        lines += ["## Several GPUs, batch 1, steps alone", "", *device_table(result["devices"]), ""]
    if result["breakdown"]:
        lines += ["## One layer, all seven linears adapted", "", *layer_table(result["breakdown"]), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in result["notes"])]
    for row in result["details"]:
        name = " ".join(str(row[key]) for key in KEY if row[key] != "-")
        if "tried" in row:
            tried = "; ".join(f"{way}: {outcome}" for way, outcome in row["tried"].items())
            lines.append(f"- {name} ran with {row['configuration']}. {tried}.")
        if "step_ms" in row:
            lines.append(
                f"- {name}: {row['step_ms']:.3f} ms a step when no token is handed to the host; the row, which hands them "
                f"over and looks for the end, differs by {row['stall_pct']:+.1f}%."
            )
        if "experts_change_pct" in row:
            lines.append(
                f"- {name}: a token's experts are others than those before it in {row['experts_change_pct']:.0f}% of the "
                f"steps; {row['distinct_experts']:.1f} are in use in a step."
            )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """ms/token of every row of batch 1, and the parts of one layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in (*result["rows"], *result["peers"]) if row["batch"] == 1 and row["ms_per_token"] is not None]
    rows.sort(key=lambda row: row["ms_per_token"])
    panels = 1 + bool(result["breakdown"])
    figure, axes = plt.subplots(
        1, panels, figsize=(8 * panels, 1.5 + 0.32 * max(len(rows), 12)), layout="constrained", squeeze=False
    )
    axis = axes[0, 0]
    names = [name_of(row) for row in rows]
    colors = {"backbone": "dimgray", "adafuse": "tab:blue"} | dict.fromkeys(METHODS[2:], "tab:green")
    bars = axis.barh(
        names, [row["ms_per_token"] for row in rows], color=[colors.get(r["method"], "tab:orange") for r in rows]
    )
    axis.bar_label(bars, [f"{row['ms_per_token']:.2f}" for row in rows], padding=3, fontsize=8)
    read, bare = result["ceilings"]["read_tbps"], [row for row in rows if row["method"] == "backbone"]
    if read is not None and bare:
        axis.axvline(
            bare[0]["bytes_gb"] / read, color="black", linestyle=":", label="backbone's bytes at the read ceiling"
        )
        axis.legend(fontsize="small", loc="upper right")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    wide = bool(rows) and rows[-1]["ms_per_token"] > 20 * rows[0]["ms_per_token"]  # else bars begin at 0
    axis.set(xscale="log" if wide else "linear", xlabel="ms/token, batch 1", title="decoding")
    if wide:
        axis.set_xlim(left=1)
    axis.grid(axis="x", alpha=0.3)
    if result["breakdown"]:
        points = sorted(result["breakdown"], key=lambda row: (row["length"], row["rank"]))
        at = range(len(points))
        for offset, name, color in ((-0.2, "adafuse", "tab:blue"), (0.2, "layerwise", "tab:orange")):
            bare_ms = [row["backbone_ms"] for row in points]
            added = [100 * (row.get(f"{name}_ms") or 0) / ms for row, ms in zip(points, bare_ms, strict=True)]
            axes[0, 1].bar([x + offset for x in at], added, width=0.4, color=color, label=name)
        axes[0, 1].set_xticks(list(at), [f"T={row['length']}\nR={row['rank']}" for row in points], fontsize=7)
        axes[0, 1].set(ylabel="adapter part, % of the backbone part", title="one layer, all seven linears adapted")
        axes[0, 1].grid(axis="y", alpha=0.3)
        axes[0, 1].legend(fontsize="small")
    figure.suptitle(provenance(result), fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def merge_parts(out: Path) -> str:
    """Write the three files; returns the tables."""
    result = merge(read_parts(out))
    (out / "decode.json").write_text(json.dumps(result, indent=2) + "\n")
    markdown = to_markdown(result)
    (out / "decode.md").write_text(markdown)
    try:
        plot(result, out / "decode.png")
    except ImportError as error:
        print(f"no decode.png: {error}", flush=True)
    return markdown
