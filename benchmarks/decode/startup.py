"""The start of decode.py: seconds from the start of its process to its end after a few tokens, with nothing compiled before
and with the programs of an earlier start, and when its parts begin and end.

    python -m benchmarks.decode.startup --model DIR --out OUT

A start is a process that runs the command of decode.py; the first has an empty cache of programs. The files of the model are
read once before, so that they are in the page cache. Parts overlap: weights are loaded by threads while programs are traced
and compiled. Written are OUT/startup-NAME.json and OUT/startup-NAME.md, with the name of the model's directory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.records import command_line, facts, write_json
from benchmarks.common.reports import table

PROMPT = "What is the capital of France?"
LIBRARIES = ("transformers", "torch", "datasets", "optax", "orbax")
HITS, COMPILATIONS = "/jax/compilation_cache/cache_hits", "/jax/core/compile/backend_compile_duration"


def run_start(report: Path, began: float, flags: Sequence[str]) -> None:
    """Run decode.py's command in this process, and write the times of its parts, in seconds since `began`, to `report`."""
    parts: list[dict[str, Any]] = []

    def since() -> float:
        return time.time() - began

    def add(name: str, begin: float, **more: Any) -> None:
        parts.append({"part": name, "begin": round(begin, 3), "end": round(since(), 3), **more})

    def timed(owner: Any, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def call(*arguments: Any, **named: Any) -> Any:
            begin = since()
            result = original(*arguments, **named)
            more = {"bytes": sum(x.nbytes for x in jax.tree.leaves(result))} if name == "weights" else {}
            add(name, begin, **more)
            return result

        setattr(owner, attribute, call)

    add("start of Python", 0.0)
    begin = since()
    from adafuse_jax.core import runtime

    runtime.set_up()
    import jax

    events: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: events.update([event]))
    with runtime.started_devices():  # as decode does before its imports
        from adafuse_jax.__main__ import decode
        from adafuse_jax.inference import console, session
        from adafuse_jax.inference.slots import Slots

        add("imports", begin)
        begin = since()
        jax.devices()
    add("devices, beyond the imports", begin)
    timed(session.HFCheckpoint, "open", "checkpoint opened")
    for name, part in {
        "load_tokenizer": "tokenizer", "stop_tokens": "chat template", "load_adapter": "adapter",
        "empty_backbone": "memory of the weights", "load_backbone": "weights",
    }.items():  # fmt: skip
        timed(session, name, part)
    timed(Slots, "compile", "programs traced")
    timed(Slots, "_warm_up", "programs warmed up")
    timed(session.Session, "answer_all", "answer")
    timed(console, "Session", "session, all of the above")
    decode(flags)
    found = [name for name in LIBRARIES if name in sys.modules]
    counts = {"compilations": events[COMPILATIONS] - events[HITS], "read_from_cache": events[HITS]}
    write_json(report, {"tokens_printed": round(since(), 3), **counts, "imported": found, "parts": parts, **facts()})


def start(flags: Sequence[str], cache: Path) -> dict[str, Any]:
    """The record of one start, with the cache of programs in `cache`. Raises `CalledProcessError`."""
    with tempfile.TemporaryDirectory() as scratch:
        report, began = Path(scratch) / "report.json", time.time()
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__]
        given = ["--report", str(report), "--began", repr(began), "--", *flags]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        subprocess.run([*command, *given], check=True, env=environment, stdout=subprocess.DEVNULL)
        return {"seconds": round(time.time() - began, 3), **json.loads(report.read_text())}


def measure(
    model: str, adapter: str | None, tokens: int, repeats: int, run: Callable[..., Any] = start
) -> dict[str, Any]:
    """Starts with an empty cache of programs and with a full one."""
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
    flags = [f"--model={model}", f"--prompt={PROMPT}", f"--max-new-tokens={tokens}"]
    flags += [] if adapter is None else [f"--adapter={adapter}"]
    with tempfile.TemporaryDirectory() as cache:
        return {
            "model": Path(model).name, "adapter": None if adapter is None else Path(adapter).name, "tokens": tokens,
            "nothing_cached": run(flags, Path(cache)), "cached": [run(flags, Path(cache)) for _ in range(repeats)],
        }  # fmt: skip


def markdown(record: dict[str, Any]) -> list[str]:
    best = min(record["cached"], key=lambda one: one["seconds"])
    starts = {"nothing cached": record["nothing_cached"], "programs cached, the fastest": best}
    lines = [f"Start of decode.py to its end after {record['tokens']} tokens: {record['model']}, {best['device']}.", ""]
    lines += table(
        ["", "seconds", "tokens printed after", "programs compiled", "read from the cache", "imported"],
        [
            [name, f"{one['seconds']:.2f}", f"{one['tokens_printed']:.2f}", one["compilations"], one["read_from_cache"],
             ", ".join(one["imported"])]
            for name, one in starts.items()
        ],
    )  # fmt: skip
    for name, one in starts.items():
        lines += ["", f"Parts, {name}:", ""]
        rows = []
        for part in one["parts"]:
            seconds = part["end"] - part["begin"]
            rate = f"{part['bytes'] / max(seconds, 1e-3) / 1e9:.2f} GB/s" if "bytes" in part else ""
            rows.append([part["part"], f"{part['begin']:.2f}", f"{part['end']:.2f}", f"{seconds:.2f}", rate])
        lines += table(["part", "begins", "ends", "seconds", ""], rows)
    return [
        *lines,
        "",
        f"All starts with programs cached: {', '.join(format(c['seconds'], '.2f') for c in record['cached'])} s.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory")
    parser.add_argument("--adapter", help="adapter directory")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="starts with the programs cached")
    parser.add_argument("--out", type=Path, help="directory of the record")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.report is not None:
        run_start(arguments.report, arguments.began, arguments.flags)
        return
    if arguments.model is None or arguments.out is None or min(arguments.tokens, arguments.repeats) < 1:
        parser.error("give --model and --out; --tokens and --repeats must be at least 1")
    command = command_line("benchmarks.decode.startup", argv)
    record = {"command": command, **measure(arguments.model, arguments.adapter, arguments.tokens, arguments.repeats)}
    name = f"startup-{record['model']}"
    write_json(arguments.out / f"{name}.json", record)
    (arguments.out / f"{name}.md").write_text("\n".join(markdown(record)) + "\n", encoding="utf-8")
    print("\n".join(markdown(record)))


if __name__ == "__main__":
    main()
