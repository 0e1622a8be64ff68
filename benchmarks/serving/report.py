"""serving.json and serving.md, made from the serving-part-*.json of `benchmarks.serving`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.records import write_json
from benchmarks.common.reports import number, table

CASES = ("bare", "one", "eight")
NOTES = (
    "The server and its clients are processes of one machine; a client counts a token when its event arrives; tokens "
    "of one event, which a server that lags behind joins, have no time between them.",
    "Offline: the same requests through the slots, 32 together, each batch ending with its longest answer; prefill counts.",
    "alone: milliseconds between tokens of one prompt in the engine of decode.py, without a bank of adapters.",
    "All answers have their given length: no token ends a row. Greedy. No two prompts begin alike.",
    "Disturbed: the closed loop, while a prompt of the given length arrives each second.",
)


def read_parts(out: Path) -> dict[str, dict[str, Any]]:
    """The parts by their names."""
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("serving-part-*.json"))]
    return {part["part"]: part for part in parts}


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def targets(parts: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The ratios that the server is judged by; None where a part is missing."""

    def of(case: str, load: str, *names: str) -> float | None:
        found: Any = parts.get(case, {}).get("loads", {}).get(load, {})
        for name in names:
            found = found.get(name, {}) if isinstance(found, dict) else {}
        return found if isinstance(found, float) else None

    def rate(case: str) -> float | None:
        return of(case, "closed-32", "tokens_per_s")

    bare, peer = parts.get("bare", {}), parts.get("peer", {})
    clients = bare.get("disturbed_clients", 8)
    return {
        "32 clients over offline, bare": ratio(rate("bare"), bare.get("offline", {}).get("tokens_per_s")),
        "32 clients, one adapter over bare": ratio(rate("one"), rate("bare")),
        "32 clients, eight adapters over bare": ratio(rate("eight"), rate("bare")),
        **{
            f"one client, {case}: time between tokens over decode.py's": ratio(
                of(case, "closed-1", "between_ms", "median"), parts.get(case, {}).get("alone", {}).get("median")
            )
            for case in ("bare", "one")
        },
        **{
            f"p99 between tokens beside long prompts, over the median without, {case}": ratio(
                of(case, "disturbed", "between_ms", "p99"), of(case, f"closed-{clients}", "between_ms", "median")
            )
            for case in CASES
        },
        "32 clients, bare, over transformers": ratio(
            rate("bare"), peer.get("closed", {}).get("32", {}).get("tokens_per_s")
        ),
    }


def merge_parts(out: Path) -> str:
    """Write the two files; the text of serving.md."""
    parts = read_parts(out)
    rows = []
    for case in CASES:
        part = parts.get(case, {})
        if "error" in part:
            rows.append([case, "", part["error"]])
        offline = part.get("offline", {}).get("tokens_per_s")
        for load, found in part.get("loads", {}).items():
            if "error" in found:
                rows.append([case, load, found["error"]])
                continue
            first, between = found["first_ms"], found["between_ms"]
            rate = found["tokens_per_s"]
            share = number(100 * rate / offline, ".0f", "%") if offline and load.startswith("closed-") else ""
            times = (f"{first['median']:.1f} / {first['p99']:.1f}", f"{between['median']:.2f} / {between['p99']:.2f}")
            rows.append([case, load, f"{rate:.0f}", share, *times])
        if part:
            alone = part.get("alone", {}).get("median")
            rows.append([case, "offline", number(offline, ".0f"), "", "", ""])
            rows.append([case, "alone", "", "", "", number(alone, ".2f")])
    for clients, found in parts.get("peer", {}).get("closed", {}).items():
        rate = f"{found['tokens_per_s']:.0f}" if "tokens_per_s" in found else found["error"]
        settings = f" ({parts['peer']['settings']})" if "settings" in parts["peer"] else ""
        rows.append([f"transformers, bare{settings}", f"closed-{clients}", rate])
    head = [
        "adapters",
        "load",
        "tokens/s",
        "of offline",
        "first token, ms, median / p99",
        "between tokens, ms, median / p99",
    ]
    judged = targets(parts)
    lines = ["# Serving", "", *table(head, rows), ""]
    lines += table(["ratio", ""], [[name, number(value, ".3f")] for name, value in judged.items()])
    lines += ["", *(f"- {note}" for note in NOTES)]
    for name, part in parts.items():
        lines.append(f"- {name}: `{part['command']}`, {part.get('device', 'unknown device')}, {part.get('commit')}.")
    text = "\n".join(lines) + "\n"
    write_json(out / "serving.json", {"parts": parts, "ratios": judged})
    (out / "serving.md").write_text(text)
    return text
