"""Prefill: milliseconds and memory by the length of the prompt, bare and with AdaFuse on all 7 linears.

    python -m benchmarks.decode.prefill --out benchmarks/results/nvidia_h200 --lengths 128 512 2048 8192 32768

writes prefill.json and prefill.md, row by row. Run again with the same commit it measures what is missing. `ms` is the time
of the prompt's programs, one after the other, into a cache that holds the prompt; `first_token_ms` what a user waits for,
`Engine.generate` up to its first token. The share of the matmul ceiling counts the products of the backbone's weights alone,
2 · tokens · weights. Peak memory is the process's, which has one method and goes from short to long prompts.

Before it is timed, a length of at most 2048 is computed by separate XLA ops too, with masked attention and the products of
all experts; the logits may differ by a relative error of 0.05, about that of two orders of sums in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adafuse_jax.core import runtime
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.prefill import chunk_lengths, largest_chunk, prefills_by_kernels
from adafuse_jax.inference.programs import prefill_chunk
from adafuse_jax.inference.state import DecodeState, cache_length
from adafuse_jax.models.decoder import Backbone
from benchmarks.common.jobs import Job, Report, run_as_job, run_job
from benchmarks.common.records import command_line, commit, facts, first_line, write_json
from benchmarks.common.reports import number, table
from benchmarks.common.timing import Stopwatch, time_calls
from benchmarks.decode.costs import LINEARS, SIZES
from benchmarks.decode.models import adapter_config, model_config, random_adapter, random_backbone

MODULE = "benchmarks.decode.prefill"
CHECKED_TOKENS = 2048
"""Longest prompt whose logits are compared: masked attention takes much longer for others."""
TOLERANCE = 0.05
METHODS = ("-", "all7")
KEY = ("size", "targets", "tokens")

Carry = tuple[DecodeState, Float[Array, "1 V"]]


def prompt_programs(model: Backbone, adapter: Any, prompt: np.ndarray, *, by_kernels: bool) -> Callable[[Carry], Carry]:
    """The programs of a prompt [T], as `Slots` runs them for a row alone."""
    sizes = chunk_lengths(len(prompt), largest_chunk(1, beside_rows=False, by_kernels=by_kernels))
    chunks, start = [], 0
    for size in sizes:
        part = prompt[start : start + size]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(part)] = part
        chunks.append(jax.device_put((tokens, np.array([start], np.int32), np.array([len(part)], np.int32))))
        start += len(part)

    def run(carry: Carry) -> Carry:
        state, logits = carry
        for chunk in chunks:
            state, logits, _ = prefill_chunk(
                model, adapter, state, logits, *chunk, None, pad_id=0, by_kernels=by_kernels
            )
        return state, logits

    return run


def empty(model: Backbone, tokens: int) -> Carry:
    config = model.config
    return DecodeState.empty(config, 1, cache_length(tokens), model.dtype), jnp.zeros((1, config.vocab_size))


def relative_error(model: Backbone, adapter: Any, prompt: np.ndarray) -> float:
    """Difference of the logits from those of separate XLA ops, relative to these."""
    found, wanted = (
        prompt_programs(model, adapter, prompt, by_kernels=by)(empty(model, len(prompt)))[1] for by in (True, False)
    )
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def measure_length(engine: Engine, prompt: np.ndarray, seconds: float, repeats: int) -> dict[str, Any]:
    """A row without its key."""
    model, adapter = engine.model, engine.adapter
    by_kernels = prefills_by_kernels(model.config, model.dtype, None)
    row: dict[str, Any] = {"by_kernels": by_kernels}
    if by_kernels and len(prompt) <= CHECKED_TOKENS:
        row["relative_error"] = relative_error(model, adapter, prompt)
        if not row["relative_error"] < TOLERANCE:
            raise ValueError(f"logits differ from those of separate XLA ops by {row['relative_error']:.3g}")
    watch, programs = Stopwatch(), prompt_programs(model, adapter, prompt, by_kernels=by_kernels)
    carry = jax.block_until_ready(programs(empty(model, len(prompt))))
    row["compile_s"] = watch.seconds
    timing, carry = time_calls(programs, carry, seconds=seconds, repeats=repeats)
    row |= {"ms": timing.ms, "spread_ms": timing.spread_ms}
    row["finite"] = bool(jnp.isfinite(carry[1]).all())
    del carry
    weights = sum(np.prod(model.config.linear_shape(name)) for name in LINEARS) * model.config.num_layers
    row["tflops"] = float(2 * len(prompt) * weights / timing.ms / 1e9)
    row["peak_gib"] = runtime.peak_device_gib()
    waits = []
    for _ in range(1 + min(3, repeats)):  # the first compiles
        (step,) = engine.generate([prompt.tolist()], max_new_tokens=1)
        waits.append(1e3 * step.seconds)
    row["first_token_ms"] = statistics.median(waits[1:])
    return row


def measure_method(job: dict[str, Any], report: Report) -> None:
    """Rows of one method, from short to long prompts."""
    lengths = sorted(job["lengths"])
    shapes = replace(SIZES[job["size"]], max_position_embeddings=max(lengths) + 1)
    config, rows, watch = model_config(shapes), [], Stopwatch()
    targets = job["targets"]
    adapter = None if targets == "-" else random_adapter(adapter_config(shapes, targets), config)
    engine = Engine(random_backbone(config), adapter, eos_ids=())
    del adapter
    print(f"  model made in {watch.seconds:.0f} s", flush=True)
    rng = np.random.default_rng(0)
    for tokens in lengths:
        row: dict[str, Any] = dict(zip(KEY, (job["size"], targets, tokens), strict=True))
        try:
            row |= measure_length(
                engine, rng.integers(3, config.vocab_size, tokens, np.int32), job["seconds"], job["repeats"]
            )
            text = "{ms:.2f} ± {spread_ms:.2f} ms, first token {first_token_ms:.2f} ms, {compile_s:.0f} s to compile"
            text = text.format(**row) + f", error {row.get('relative_error', float('nan')):.3g}"
        except Exception as error:
            text = row["error"] = first_line(error)
        rows.append(row)
        print(f"  {job['size']} {targets}, {tokens} tokens: {text}", flush=True)
        report({"rows": rows})


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by their key, the new ones in place of old ones."""
    by_key = {tuple(row[key] for key in KEY): row for row in (*old, *new)}
    return [by_key[key] for key in sorted(by_key)]


def report_of(record: dict[str, Any]) -> str:
    ceiling = record.get("ceilings", {}).get("best_matmul")
    lines = [f"# Prefill: {record['device']}, JAX {record['jax']}", "", f"    {record['command']}", ""]
    if ceiling:
        lines += [f"Ceiling of bf16 products in this run: {ceiling:.0f} TFLOP/s. One row, bf16, random weights.", ""]
    head = (
        "model",
        "adapted",
        "tokens",
        "ms",
        "of the ceiling",
        "over bare, ms",
        "first token, ms",
        "peak, GiB",
        "error",
    )
    rows: list[Sequence[Any]] = []
    bare: dict[str, dict[int, float]] = {row["size"]: {} for row in record["rows"]}
    for row in record["rows"]:
        if row["targets"] == "-" and "ms" in row:
            bare[row["size"]][row["tokens"]] = row["ms"]
    for row in record["rows"]:
        name = row["size"], {"-": "bare", "all7": "all 7"}[row["targets"]], row["tokens"]
        if "error" in row:
            rows.append((*name, row["error"]))
            continue
        of_bare = bare[row["size"]].get(row["tokens"]) if row["targets"] != "-" else None
        share = 100 * row["tflops"] / ceiling if ceiling and row["targets"] == "-" else None
        rows.append((
            *name, f"{row['ms']:.2f} ± {row['spread_ms']:.2f}", number(share, ".0f", "%"),
            number(of_bare and row["ms"] - of_bare, "+.2f"), number(row["first_token_ms"], ".2f"),
            number(row["peak_gib"], ".1f"), number(row.get("relative_error"), ".3f"),
        ))  # fmt: skip
    return "\n".join([*lines, *table(head, rows)])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of prefill.json and prefill.md")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["llama2-7b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048, 8192, 32768])
    parser.add_argument("--targets", nargs="+", choices=METHODS, default=[*METHODS], help="- is the bare backbone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--job-seconds", type=float, default=240, help="a process is stopped after these")
    arguments = parser.parse_args(argv)
    path = arguments.out / "prefill.json"
    record = runtime_record(path) | {"command": command_line(MODULE, argv)}
    is_tiny = arguments.sizes == ["tiny"]
    ceilings = {"elements": 2**12, "matmul_dim": 64, "seconds": 2e-4}
    if not is_tiny:
        ceilings = {"elements": 2**28, "matmul_dim": 8192, "seconds": 0.06}
    jobs = [Job(name="ceilings", module="benchmarks.decode.rows", settings={"kind": "ceilings", **ceilings})]
    for size in arguments.sizes:
        for targets in arguments.targets:
            missing = [n for n in arguments.lengths if not is_measured(record, (size, targets, n))]
            settings = {"size": size, "targets": targets, "lengths": missing}
            rows = [dict(zip(KEY, (size, targets, n), strict=True)) for n in missing]
            jobs += [Job(name=f"{size} {targets}", module=MODULE, settings=settings, rows=rows)] if missing else []
    common = {"seconds": 2e-4 if is_tiny else 0.2, "repeats": arguments.repeats}
    for job in jobs:
        result, problem = run_job(job, common, arguments.job_seconds, sys.executable)
        found = result.get("rows", [])
        done = {tuple(row[key] for key in KEY) for row in found}
        found += [row | {"error": problem} for row in job.rows if problem and tuple(row.values()) not in done]
        record |= {key: result[key] for key in ("device", "jax", "ceilings") if key in result}
        record["rows"] = merged(record["rows"], found)
        if "device" in record:
            write_json(path, record)
            (arguments.out / "prefill.md").write_text(report_of(record) + "\n", encoding="utf-8")
    if "device" in record:
        print(report_of(record), flush=True)


def runtime_record(path: Path) -> dict[str, Any]:
    """The record at `path` if it is of this commit, else a new one."""
    import json

    if path.exists() and (old := json.loads(path.read_text()))["commit"] == commit():
        return old
    return {"commit": commit(), "rows": []}


def is_measured(record: dict[str, Any], key: tuple[str, str, int]) -> bool:
    return any(tuple(row[name] for name in KEY) == key and "error" not in row for row in record["rows"])


if __name__ == "__main__":
    if "--job" in sys.argv:
        runtime.set_up()
        run_as_job(__doc__, measure_method, facts)
    else:
        main(sys.argv[1:])
