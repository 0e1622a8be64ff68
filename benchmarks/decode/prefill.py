"""Prefill: milliseconds and memory by the length of the prompt, bare and with AdaFuse on all 7 linears.

    python -m benchmarks.decode.prefill --out benchmarks/results/nvidia_h200 --lengths 128 512 2048 8192 32768

writes prefill.json and prefill.md, row by row. Run again with the same commit it measures what is missing. `ms` is the time
of the prompt's programs, one after the other, into a cache that holds the prompt; with --first-token also what a user waits
for, `Engine.generate` up to its first token. all7-dense multiplies all experts where all7 may multiply the chosen ones only.
The share of the matmul ceiling, measured in the same process, counts the products of the backbone's weights alone,
2 · tokens · weights. Peak memory is the process's, which has one method and goes from short to long prompts.

One matrix product has been a tenth faster in one process than in the next, which is half of what an adapter adds. So the
process of an adapted model times the bare one too, repeat by repeat in turn; `over bare` is the median of the differences.

Before it is timed, a length of --check is computed by separate XLA ops too, with masked attention and the products of all
experts, in bfloat16 and in float32. `error` is that of the last token's logits, in norms of float32's, by the kernels and
beside it by bfloat16's XLA ops; it is too large if it is more than 1.25 times theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adafuse_jax.adapters import prompts
from adafuse_jax.core import runtime
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.prefill import chunk_lengths, largest_chunk, prefills_by_kernels
from adafuse_jax.inference.programs import prefill_chunk, prefill_chunk_by_kernels
from adafuse_jax.inference.state import DecodeState, cache_length
from adafuse_jax.models.decoder import Backbone
from benchmarks.common.ceilings import measure_ceilings
from benchmarks.common.jobs import Job, Report, run_as_job, run_job
from benchmarks.common.records import command_line, commit, facts, first_line, write_json
from benchmarks.common.reports import number, table
from benchmarks.common.timing import MAX_CALLS, Stopwatch, Timing, time_calls
from benchmarks.decode.costs import LINEARS, SIZES
from benchmarks.decode.models import adapter_config, in_float32, model_config, random_adapter, random_backbone

MODULE = "benchmarks.decode.prefill"
TOLERANCE = 1.25
"""Largest error, over that of separate XLA ops in the same type."""
METHODS = {"-": "bare", "all7": "all 7", "all7-dense": "all 7, all experts"}
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

    program = prefill_chunk_by_kernels if by_kernels else prefill_chunk

    def run(carry: Carry) -> Carry:
        state, logits = carry
        for chunk in chunks:
            state, logits, _ = program(model, adapter, state, logits, *chunk, None, pad_id=0)
        return state, logits

    return run


def empty(model: Backbone, tokens: int) -> Carry:
    config = model.config
    return DecodeState.empty(config, 1, cache_length(tokens), model.dtype), jnp.zeros((1, config.vocab_size))


def errors(model: Backbone, adapter: Any, prompt: np.ndarray) -> dict[str, float]:
    """Form → distance of its last logits from those in float32, in norms of these."""

    def logits(model: Backbone, adapter: Any, *, by_kernels: bool = False) -> np.ndarray:
        run = prompt_programs(model, adapter, prompt, by_kernels=by_kernels)
        return np.asarray(run(empty(model, len(prompt)))[1], np.float64)

    found = {form: logits(model, adapter, by_kernels=form == "kernels") for form in ("kernels", "xla")}
    with jax.default_matmul_precision("highest"):
        exact = logits(*in_float32((model, adapter)))
    return {form: float(np.linalg.norm(x - exact) / np.linalg.norm(exact)) for form, x in found.items()}


def time_in_turn(
    programs: Mapping[str, Callable[[Carry], Carry]], carry: Carry, *, seconds: float, repeats: int
) -> tuple[dict[str, Timing], Carry]:
    """Times of each of the compiled programs and the last carry: a repeat of one, of about `seconds`, then of the next. The
    first round is not counted, in which the clock settles."""
    calls, found = {}, {name: [] for name in programs}  # type: ignore[var-annotated]
    for name, run in programs.items():
        timing, carry = time_calls(run, carry, calls=1, repeats=1, warm_up=False)
        calls[name] = min(max(round(1e3 * seconds / timing.ms), 1), MAX_CALLS)
    for _ in range(1 + repeats):
        for name, run in programs.items():
            timing, carry = time_calls(run, carry, calls=calls[name], repeats=1, warm_up=False)
            found[name] += timing.repeats
    return {name: Timing(repeats=tuple(times[1:]), calls=calls[name]) for name, times in found.items()}, carry


def measure_length(engine: Engine, prompt: np.ndarray, job: dict[str, Any]) -> dict[str, Any]:
    """A row without its key."""
    model, adapter = engine.model, engine.adapter
    by_kernels = prefills_by_kernels(model.config, model.dtype, None)
    row: dict[str, Any] = {"by_kernels": by_kernels}
    if by_kernels and len(prompt) in job["check"]:
        row["errors"] = errors(model, adapter, prompt)
    programs = {"own": prompt_programs(model, adapter, prompt, by_kernels=by_kernels)}
    if adapter is not None:
        programs["bare"] = prompt_programs(model, None, prompt, by_kernels=by_kernels)
    watch = Stopwatch()
    carry = jax.block_until_ready(programs["own"](empty(model, len(prompt))))
    row["compile_s"] = watch.seconds
    if adapter is not None:
        carry = programs["bare"](carry)
    times, carry = time_in_turn(programs, carry, seconds=job["seconds"], repeats=job["repeats"])
    timing = times["own"]
    row |= {"ms": timing.ms, "spread_ms": timing.spread_ms}
    if adapter is not None:
        pairs = zip(timing.repeats, times["bare"].repeats, strict=True)
        over = Timing(repeats=tuple(own - bare for own, bare in pairs))
        row |= {"bare_ms": times["bare"].ms, "over_bare_ms": over.ms, "over_bare_spread_ms": over.spread_ms}
        carry = programs["own"](carry)
    row["finite"] = bool(jnp.isfinite(carry[1]).all())
    del carry
    weights = sum(np.prod(model.config.linear_shape(name)) for name in LINEARS) * model.config.num_layers
    row["tflops"] = float(2 * len(prompt) * weights / timing.ms / 1e9)
    row["peak_gib"] = runtime.peak_device_gib()
    if job["first_token"]:
        waits = [next(engine.generate([prompt.tolist()], max_new_tokens=1)).seconds for _ in range(4)]
        row["first_token_ms"] = 1e3 * statistics.median(waits[1:])  # the first compiles
    return row


def measure_method(job: dict[str, Any], report: Report) -> None:
    """Rows of one method, from short to long prompts."""
    ceilings = measure_ceilings(2**12, job["matmul_dim"], seconds=job["seconds"] / 10)
    lengths, targets = sorted(job["lengths"]), job["targets"]
    shapes = replace(SIZES[job["size"]], max_position_embeddings=max(lengths) + 1)
    config, rows, watch = model_config(shapes), [], Stopwatch()
    adapter = None
    if targets != "-":
        adapter = random_adapter(adapter_config(shapes, "all7"), config)
    if targets == "all7-dense":
        prompts.LEAST_TOKENS = sys.maxsize
    engine = Engine(random_backbone(config), adapter, eos_ids=())
    del adapter
    print(f"  model made in {watch.seconds:.0f} s", flush=True)
    rng = np.random.default_rng(0)
    for tokens in lengths:
        row: dict[str, Any] = dict(zip(KEY, (job["size"], targets, tokens), strict=True))
        try:
            row |= measure_length(engine, rng.integers(3, config.vocab_size, tokens, np.int32), job)
            row["ceiling_tflops"] = ceilings["best_matmul"]
            text = "{ms:.2f} ± {spread_ms:.2f} ms, {tflops:.0f} of {ceiling_tflops:.0f} TFLOP/s, compiled {compile_s:.0f} s"
            text = text.format(**row) + f", error {error_text(row.get('errors')) or 'not measured'}"
        except Exception as error:
            text = row["error"] = first_line(error)
        rows.append(row)
        print(f"  {job['size']} {targets}, {tokens} tokens: {text}", flush=True)
        report({"rows": rows})


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by their key, the new ones in place of old ones."""
    by_key = {tuple(row[key] for key in KEY): row for row in (*old, *new)}
    return [by_key[key] for key in sorted(by_key)]


def error_text(errors: dict[str, float] | None) -> str:
    """A cell of the table: not compared, or both errors, of which the kernels' may be too large."""
    if errors is None:
        return ""
    large = "" if errors["kernels"] <= TOLERANCE * errors["xla"] else ", **too large**"
    return f"{errors['kernels']:.3f} (XLA {errors['xla']:.3f}){large}"


def report_of(record: dict[str, Any]) -> str:
    lines = [f"# Prefill: {record['device']}, JAX {record['jax']}", "", f"    {record['command']}", ""]
    lines += [
        "One row, bf16, random weights. TFLOP/s count the backbone's products; the ceiling is that of the process.",
        "",
    ]
    head = (
        "model",
        "adapted",
        "tokens",
        "ms",
        "TFLOP/s",
        "of the ceiling",
        "over bare, ms",
        "first token, ms",
        "peak, GiB",
        "error",
    )
    rows: list[Sequence[Any]] = []
    for row in record["rows"]:
        name = row["size"], METHODS[row["targets"]], row["tokens"]
        if "error" in row:
            rows.append((*name, row["error"]))
            continue
        over = "{over_bare_ms:+.2f} ± {over_bare_spread_ms:.2f}".format(**row) if "over_bare_ms" in row else ""
        rows.append((
            *name, f"{row['ms']:.2f} ± {row['spread_ms']:.2f}", f"{row['tflops']:.0f}",
            f"{100 * row['tflops'] / row['ceiling_tflops']:.0f}%", over,
            number(row.get("first_token_ms"), ".2f"), number(row["peak_gib"], ".1f"),
            error_text(row.get("errors")),
        ))  # fmt: skip
    return "\n".join([*lines, *table(head, rows)])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of prefill.json and prefill.md")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["llama2-7b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048, 8192, 32768])
    parser.add_argument("--targets", nargs="+", choices=METHODS, default=["-", "all7"], help="- is the bare backbone")
    parser.add_argument(
        "--check", nargs="*", type=int, default=[128, 512, 2048], help="lengths whose logits are compared"
    )
    parser.add_argument("--first-token", action="store_true", help="through the engine, too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--job-seconds", type=float, default=240, help="a process is stopped after these")
    arguments = parser.parse_args(argv)
    path = arguments.out / "prefill.json"
    record = record_of_commit(path) | {"command": command_line(MODULE, argv)}
    is_tiny = arguments.sizes == ["tiny"]
    common = {
        "seconds": 2e-4 if is_tiny else 0.2, "matmul_dim": 64 if is_tiny else 8192, "repeats": arguments.repeats,
        "check": arguments.check, "first_token": arguments.first_token,
    }  # fmt: skip
    for size, targets in product(arguments.sizes, arguments.targets):
        missing = [n for n in arguments.lengths if not is_measured(record, (size, targets, n))]
        if not missing:
            continue
        rows = [dict(zip(KEY, (size, targets, n), strict=True)) for n in missing]
        settings = {"size": size, "targets": targets, "lengths": missing}
        job = Job(name=f"{size} {targets}", module=MODULE, settings=settings, rows=rows)
        result, problem = run_job(job, common, arguments.job_seconds, sys.executable)
        found = result.get("rows", [])
        done = {tuple(row[key] for key in KEY) for row in found}
        found += [row | {"error": problem or "no result"} for row in rows if tuple(row.values()) not in done]
        record |= {key: result[key] for key in ("device", "jax") if key in result}
        record["rows"] = merged(record["rows"], found)
        if "device" in record:
            write_json(path, record)
            (arguments.out / "prefill.md").write_text(report_of(record) + "\n", encoding="utf-8")
    if "device" in record:
        print(report_of(record), flush=True)


def record_of_commit(path: Path) -> dict[str, Any]:
    """The record at `path` if it is of this commit, else a new one."""
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
