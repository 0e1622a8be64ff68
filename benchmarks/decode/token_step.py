"""The megakernel's step by itself, at Llama-2-7B's shapes: ms by adapted linears and number of rows, or a timeline.

    python -m benchmarks.decode.token_step --cases bare qv all7 all7:8 all7:32      # targets, or targets:rows
    python -m benchmarks.decode.token_step --cases bare all7 all7:32 --quantize none int8 int4
    python -m benchmarks.decode.token_step --cases bare --layers 3 --timeline

for whoever changes the kernel: it compiles no prefill, and prints a case as soon as it is timed. Random weights, a cache of
512 slots, 128 tokens in it (200 in the timeline); steps are chained, and every row begins with a token of its own. The
timeline is from Mosaic GPU's own profiler: for each part of each phase of the last of three steps, when it begins and how
long it takes, in thousands of cycles over all thread blocks. It needs shared memory, which the pipeline gives up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adafuse_jax.inference.backends.megakernel import Fused, Megakernel, fused_step
from adafuse_jax.models.config import Quantize
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.quantised import LAYOUTS
from benchmarks.common.timing import Stopwatch, wait
from benchmarks.decode.costs import SIZES, TARGETS
from benchmarks.decode.merged_step import PROMPT, SLOTS, lower, time_steps
from benchmarks.decode.models import adapter_config, model_config, random_adapter, random_backbone
from benchmarks.decode.rows import running_state
from pallas_kernels.megakernel import Profile

SHAPES = SIZES["llama2-7b"]
PROFILED_PROMPT = 200


def case_of(text: str) -> tuple[str, int]:
    """(targets, rows) of `targets` or `targets:rows`."""
    targets, _, rows = text.partition(":")
    names = "bare", *(name for name, linears in TARGETS.items() if linears)
    if targets not in names or not (rows or "1").isdecimal() or rows == "0":
        raise argparse.ArgumentTypeError(f"{text}: give {', '.join(names)}, and perhaps a number of rows, as in qv:8")
    return targets, int(rows or 1)


def time_cases(
    cases: Sequence[tuple[str, int]], num_layers: int, steps: int, repeats: int, quantize: Quantize | None = None
) -> None:
    config = replace(model_config(SHAPES), num_layers=num_layers)
    model, weights = random_backbone(config, quantize=quantize), f"{quantize} " if quantize else ""
    backends: dict[str, Megakernel] = {}
    for targets, _ in cases:
        if targets not in backends:
            adapter = None if targets == "bare" else random_adapter(adapter_config(SHAPES, targets), config)
            backends[targets] = Megakernel(model, adapter)
    for targets, batch in cases:  # not while another is compiled: that delays the steps
        state, watch = running_state(config, model.dtype, batch, SLOTS, PROMPT), Stopwatch()
        step = lower(backends[targets], None, state).compile()
        seconds = watch.seconds
        timing, *_ = time_steps(backends[targets], step, state, steps, repeats)
        print(f"{weights}{targets}:{batch}, {num_layers} layers: {timing}, compiled in {seconds:.0f} s", flush=True)


def timeline(targets: str, batch: int, num_layers: int, quantize: Quantize | None = None) -> list[str]:
    """Lines of `summarise` for one case."""
    config = replace(model_config(SHAPES), num_layers=num_layers)
    model = random_backbone(config, quantize=quantize)
    adapter = None if targets == "bare" else random_adapter(adapter_config(SHAPES, targets), config)
    cache = KVCache.empty(config, batch, SLOTS, model.dtype)
    tokens, positions = jnp.arange(batch, dtype=jnp.int32), jnp.full(batch, PROFILED_PROMPT, jnp.int32)
    with tempfile.TemporaryDirectory() as folder:
        step = jax.jit(partial(fused_step, profile=Profile(directory=folder)))
        for _ in range(3):
            wait(step(model, adapter, Fused.of(model, adapter), tokens, positions, cache))
            jax.effects_barrier()
        newest = max(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return summarise(json.loads(newest.read_text())["traceEvents"])


def summarise(events: list[dict[str, Any]]) -> list[str]:
    """A line for each scope that the computing warpgroups go through, in order: its name, its first and last beginning, its
    shortest, median and longest duration, in the events' own unit. They begin ("B") and end ("E") nested, by "tid"."""
    threads: dict[Any, list[tuple[str, float, float]]] = defaultdict(list)
    opened: dict[Any, list[tuple[int, str, float]]] = defaultdict(list)
    for event in events:
        thread = event.get("tid")
        if event.get("ph") == "B":
            opened[thread].append((len(threads[thread]), event["name"], event["ts"]))
            threads[thread].append((event["name"], event["ts"], 0.0))
        elif event.get("ph") == "E":
            at, name, begun = opened[thread].pop()
            threads[thread][at] = name, begun, event["ts"] - begun
    length = max(map(len, threads.values()))  # the copying warpgroups have but one scope
    computing = [thread for thread in threads.values() if len(thread) == length]
    start, lines = min(thread[0][1] for thread in computing), []
    for place in range(length):
        scopes = [thread[place] for thread in computing]
        names = "/".join(sorted({name for name, _, _ in scopes}))
        begins, took = [at - start for _, at, _ in scopes], [duration for _, _, duration in scopes]
        shortest, median, longest = min(took), statistics.median(took), max(took)
        lines.append(
            f"{names:10} from {min(begins):8.2f} to {max(begins):8.2f}, takes {shortest:.2f}, {median:.2f}, {longest:.2f}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [("bare", 1), ("qv", 1), ("all7", 1), ("all7", 8), ("all7", 32)]
    parser.add_argument(
        "--cases", nargs="+", type=case_of, default=usual, metavar="CASE", help="targets, or targets:rows"
    )
    parser.add_argument(
        "--quantize", nargs="+", choices=("none", *LAYOUTS), default=["none"], help="the linears' weights"
    )
    parser.add_argument("--layers", type=int, default=SHAPES.num_layers)
    parser.add_argument("--steps", type=int, default=60, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeline", action="store_true", help="of the first case and weights, instead of times")
    arguments = parser.parse_args(argv)
    if min(arguments.layers, arguments.steps, arguments.repeats) < 1:
        parser.error("--layers, --steps and --repeats must be at least 1")
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    weights = [None if name == "none" else name for name in arguments.quantize]
    if arguments.timeline:
        targets, batch = arguments.cases[0]
        print("\n".join(timeline(targets, batch, arguments.layers, weights[0])))
    else:
        for quantize in weights:
            time_cases(arguments.cases, arguments.layers, arguments.steps, arguments.repeats, quantize)


if __name__ == "__main__":
    main()
