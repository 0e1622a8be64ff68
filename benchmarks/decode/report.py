"""decode.json, decode.md and decode.png, made from the part-*.json of `benchmarks.decode`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.records import write_json
from benchmarks.common.reports import number, picture, table
from benchmarks.decode.costs import QUANTISED, SIZES, Shapes, costs

KEY = ("method", "targets", "strategy", "batch")
FIELDS = (
    *KEY, "ms_per_token", "spread_ms", "overhead_pct", "bytes_gb", "read_bandwidth_pct", "peak_gib", "params_b", "flops_g",
)  # fmt: skip
EXTRA = ("breakdown", "contexts", "devices")
"""Lists of a part that are tables of their own; one measured later stands for those before, of devices row by row."""
METHODS = ("backbone", "adafuse", "lora", "moral", "mola", "pesc")
STRATEGIES = (
    "-",
    "fused",
    "unmerged",
    *(f"{strategy}-{name}" for strategy in ("fused", "unmerged") for name in QUANTISED),
    "golden",
    "switch",
    "simple",
    "merged",
)
PEERS = ("hf", "hf-compiled", "peft-lora", "peft-lora-compiled", "lora-moe", "lora-moe-compiled")
NOTES = (
    "ms/token is the time of a step after the first token, which prefill makes: a token of every row of the batch. It is "
    "the median over the queries, ± their slowest less their fastest. Compilation is in none of the times.",
    "Bytes are computed, per step: weights, norms and head, the cache up to its mean length, the factors of the experts in "
    "use, and what a merge writes and reads again. The share of the read bandwidth is these bytes over the time.",
    "Over backbone: over the row of the same batch without an adapter, by the megakernel where that can run; of unmerged "
    "and simple, over the unfused one, in bfloat16 also of quantised weights; of a peer, over hf in the same form.",
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
    unfused = row["strategy"].startswith(("unmerged", "simple"))
    return "backbone", "-", "unmerged" if unfused else "-", row["batch"]


def complete(
    row: dict[str, Any], rows: dict[tuple[Any, ...], dict[str, Any]], shapes: Shapes, read: float | None
) -> Any:
    """`FIELDS` of a measured row, None where there is no value."""
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
    measured = [part["ceilings"] for part in parts if "ceilings" in part]
    ceilings = {
        f"{kind}_tbps": max((max(of[kind].values()) for of in measured), default=None) for kind in ("read", "copy")
    }
    ordered = sorted(rows.values(), key=rank_of)
    finished = {key_of(row): complete(row, rows, shapes, ceilings["read_tbps"]) for row in ordered}
    versions = {name: version for part in parts for name, version in part["versions"].items()}
    extras = [{k: v for k, v in row.items() if k in KEY or k not in FIELDS} for row in ordered]
    commands, prompts, commits = (
        list(dict.fromkeys(part[name] for part in parts if part.get(name))) for name in ("command", "prompts", "commit")
    )
    tables: dict[str, list[Any]] = {
        name: next((part[name] for part in reversed(parts) if name in part), []) for name in EXTRA
    }
    by_place = {
        tuple(row.get(key) for key in ("size", *KEY[:3], "devices")): row
        for part in parts
        for row in part.get("devices", [])
    }
    tables["devices"] = [*by_place.values()]
    notes = [*(f"Prompts: {text}." for text in prompts), *NOTES]
    for of in measured[-1:]:
        speeds = (f"{kind} by {name} {speed:.2f}" for kind in ("read", "copy") for name, speed in of[kind].items())
        notes.append(f"Ceilings, TB/s: {', '.join(speeds)}.")
    notes += [problem for part in parts for problem in part.get("problems", [])]
    return {
        "device": next((part["device"] for part in reversed(parts) if "device" in part), None),
        "jax": versions.pop("jax", None),
        **versions,
        **({"commit": "; ".join(commits)} if commits else {}),
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


def rows_table(rows: list[dict[str, Any]], details: dict[tuple[Any, ...], dict[str, Any]]) -> list[str]:
    """Lines of one table; a row that failed has its error in the place of the time."""
    head = (
        "method", "targets", "strategy", "batch", "ms/token", "over backbone", "GB/token", "of read", "peak GiB",
        "parameters, B", "GFLOP/token", "prefill ms", "queries × tokens",
    )  # fmt: skip
    cells = []
    for row in rows:
        more = details[key_of(row)]
        key, params = [row[key] for key in KEY], number(row["params_b"], ".3f")
        if row["ms_per_token"] is None:
            cells.append([*key, more.get("error", "not measured"), *[""] * 4, params])
            continue
        cells.append([
            *key, f"{row['ms_per_token']:.3f} ± {row['spread_ms']:.3f}", number(row["overhead_pct"], "+.1f", "%"),
            number(row["bytes_gb"], ".2f"), number(row["read_bandwidth_pct"], ".0f", "%"), number(row["peak_gib"], ".1f"),
            params, number(row["flops_g"], ".1f"), number(more.get("prefill_ms"), ".1f"),
            f"{more['queries']} × {more['new_tokens']}",
        ])  # fmt: skip
    return table(head, cells)


def layer_table(breakdown: list[dict[str, Any]]) -> list[str]:
    def cells(row: dict[str, Any]) -> list[Any]:
        found = [row["length"], row["rank"], f"{row['backbone_ms']:.4f}"]
        for name in ("adafuse", "layerwise"):
            added = row.get(f"{name}_ms")
            if added is None:
                found += [row.get(f"{name}_error", "not measured"), ""]
            else:
                found += [f"{added:.4f}", f"{100 * added / row['backbone_ms']:+.1f}%"]
        return found

    head = "tokens", "R", "bare layer, ms", "AdaFuse adds, ms", "", "layer-wise adds, ms", ""
    return table(head, map(cells, sorted(breakdown, key=lambda row: (row["length"], row["rank"]))))


def context_table(contexts: list[dict[str, Any]], read: float | None) -> list[str]:
    """Comparison of each step with that of the shortest context."""
    first: dict[str, Any] = {}
    cells = []
    for row in contexts:
        start = first.setdefault(row["method"], row)
        share = bytes_ms = None
        if read is not None:
            share, bytes_ms = 100 * row["bytes_gb"] / row["ms"] / read, (row["bytes_gb"] - start["bytes_gb"]) / read
        cells.append([
            name_of(row), row["context"], f"{row['ms']:.3f}", f"{row['bytes_gb']:.2f}", number(share, ".0f", "%"),
            f"{row['ms'] - start['ms']:.3f}", number(bytes_ms, ".3f"),
        ])  # fmt: skip
    head = "", "tokens in the cache", "ms", "GB", "of read", "more than the shortest, ms", "its bytes' own, ms"
    return table(head, cells)


def device_table(rows: list[dict[str, Any]], read: float | None) -> list[str]:
    """Comparison of each step with the fastest of one device, and with its own strategy there; its share of what the devices
    can read together, `read` TB/s each; and the logits' error over that of one device."""

    def cells(row: dict[str, Any]) -> list[Any]:
        name = " ".join(filter(None, (row.get("size"), name_of(row))))
        if "ms" not in row:
            return [name, row["devices"], row["error"], "", "", "", ""]
        alone = [
            r
            for r in rows
            if r["devices"] == 1 and "ms" in r and all(r.get(k) == row.get(k) for k in ("size", "method", "quantize"))
        ]
        same = next((r for r in alone if r["strategy"] == row["strategy"]), None)
        fastest = min(alone, key=lambda r: r["ms"], default=None)
        speeds = [f"{base['ms'] / row['ms']:.2f}×" if base else "" for base in (fastest, same)]
        share = 100 * row["bytes_gb"] / row["ms"] / read / row["devices"] if read and "bytes_gb" in row else None
        end = "×" if row.get("correct", True) else "× WRONG"
        error = row["logits_off"] / row["logits_off_one"] if row.get("logits_off_one") else None
        return [name, row["devices"], f"{row['ms']:.3f}", *speeds, number(share, ".0f", "%"), number(error, ".2f", end)]

    head = "", "GPUs", "ms", "speed over one, its fastest", "over one, the same strategy", "of read", "logits' error"
    return table(head, map(cells, rows))


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
            lines += [f"## {title}", "", *rows_table(rows, details), ""]
    if result["contexts"]:
        lines += ["## Longer contexts, batch 1, steps alone", "", *context_table(result["contexts"], read), ""]
    if result["devices"]:
        lines += ["## Several GPUs, batch 1, steps alone", "", *device_table(result["devices"], read), ""]
    if result["breakdown"]:
        lines += ["## One layer, all seven linears adapted", "", *layer_table(result["breakdown"]), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in result["notes"])]
    for row in result["details"]:
        name = " ".join(str(row[key]) for key in KEY if row[key] != "-")
        if "tried" in row:
            tried = "; ".join(": ".join(pair) for pair in row["tried"].items())
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
    rows = [row for row in (*result["rows"], *result["peers"]) if row["batch"] == 1 and row["ms_per_token"] is not None]
    rows.sort(key=lambda row: row["ms_per_token"])
    panels = 1 + bool(result["breakdown"])
    size = 8 * panels, 1.5 + 0.32 * max(len(rows), 12)
    with picture(path, ncols=panels, figsize=size, layout="constrained", squeeze=False) as (figure, axes):
        plot_rows(axes[0, 0], rows, result["ceilings"]["read_tbps"])
        if result["breakdown"]:
            plot_layer(axes[0, 1], result["breakdown"])
        figure.suptitle(provenance(result), fontsize="medium")


def plot_rows(axis: Any, rows: list[dict[str, Any]], read: float | None) -> None:
    """Bars of ms/token, the fastest first."""
    colors = {"backbone": "dimgray", "adafuse": "tab:blue"} | dict.fromkeys(METHODS[2:], "tab:green")
    times = [row["ms_per_token"] for row in rows]
    bars = axis.barh(list(map(name_of, rows)), times, color=[colors.get(row["method"], "tab:orange") for row in rows])
    axis.bar_label(bars, [f"{ms:.2f}" for ms in times], padding=3, fontsize=8)
    bare = next((row for row in rows if row["method"] == "backbone"), None)
    if read is not None and bare is not None:
        label = "backbone's bytes at the read ceiling"
        axis.axvline(bare["bytes_gb"] / read, color="black", linestyle=":", label=label)
        axis.legend(fontsize="small", loc="upper right")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    wide = bool(rows) and times[-1] > 20 * times[0]  # else bars begin at 0
    axis.set(xscale="log" if wide else "linear", xlabel="ms/token, batch 1", title="decoding")
    if wide:
        axis.set_xlim(left=1)
    axis.grid(axis="x", alpha=0.3)


def plot_layer(axis: Any, breakdown: list[dict[str, Any]]) -> None:
    """Bars of the adapter part in percent of the bare layer, by length and rank."""
    points = sorted(breakdown, key=lambda row: (row["length"], row["rank"]))
    at = range(len(points))
    for offset, name, color in ((-0.2, "adafuse", "tab:blue"), (0.2, "layerwise", "tab:orange")):
        added = [100 * (row.get(f"{name}_ms") or 0) / row["backbone_ms"] for row in points]
        axis.bar([x + offset for x in at], added, width=0.4, color=color, label=name)
    axis.set_xticks(list(at), [f"T={row['length']}\nR={row['rank']}" for row in points], fontsize=7)
    axis.set(ylabel="adapter part, % of the backbone part", title="one layer, all seven linears adapted")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small")


def merge_parts(out: Path) -> str:
    """Write the three files; returns the tables."""
    result = merge(read_parts(out))
    write_json(out / "decode.json", result)
    markdown = to_markdown(result)
    (out / "decode.md").write_text(markdown)
    try:
        plot(result, out / "decode.png")
    except ImportError as error:
        print(f"no decode.png: {error}", flush=True)
    return markdown
