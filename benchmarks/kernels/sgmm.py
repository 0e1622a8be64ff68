"""SGMM at the shapes of Llama-2-7B on one GPU: time, bandwidth and error, beside the ceilings of this GPU.

    python -m benchmarks.kernels.sgmm --out benchmarks/results/nvidia_h200

writes sgmm.json, sgmm.md and sgmm.png. 8 experts in bfloat16, random numbers; a merge adds to every layer
W[out, in] += Σ_j c_j · B[e_j] A[e_j], and moves

    bytes = read base + write W + read A and B of the products that count        FLOP = products · 2·out·in·R

    golden      k products into other buffers than those read
    switch      2k products in place
    one shared  2k − 1 products in place: one expert stays from token to token

`simple` is the paper's ablation, one XLA product per layer and linear. Every result is compared before it is timed: all
of it with the plain reference, and 64 rows of a layer with float64. A wrong one is not timed, and ends the run with an
error after the rest is written. Calls are chained through the donated weights, without waiting between them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.common.ceilings import measure_ceilings
from benchmarks.common.records import command_line, facts, first_line, write_json
from benchmarks.common.timing import Stopwatch, time_calls
from benchmarks.kernels.sgmm_check import errors, wrong_elements
from benchmarks.kernels.sgmm_report import log_line, plot, to_markdown
from pallas_kernels.sgmm import IMPLEMENTATIONS, Terms, golden_terms, sgmm, switch_terms
from pallas_kernels.sgmm.reference import merge_layer

DTYPE = jnp.bfloat16
EXPERT_ORDER = np.array([5, 2, 7, 0, 3, 6, 1, 4])
SCALE = 2.0
MODES = ("golden", "switch", "one shared")
CHECKED_SLOTS = len(EXPERT_ORDER)
Weights = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes and effort of a run. `seconds` are those of one repeat, in which as many calls are chained as fit."""

    name: str
    num_layers: int
    embed_dim: int
    hidden_dim: int
    rank: int = 64
    top_k: int = 2
    sweep_ranks: tuple[int, ...] = (64, 128, 16, 8, 32)
    sweep_top_ks: tuple[int, ...] = (1, 2, 3, 4)
    repeats: int = 9
    sweep_repeats: int = 4
    seconds: float = 0.03
    checked_rows: int = 64
    ceiling_elements: int = 2**30
    matmul_dim: int = 8192

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        d, f = self.embed_dim, self.hidden_dim
        attention = {f"{name}_proj": (d, d) for name in "qkvo"}
        return attention | {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}

    @property
    def targets(self) -> dict[str, tuple[str, ...]]:
        return {"q, v": ("q_proj", "v_proj"), "all 7": tuple(self.shapes)}


LLAMA2_7B = Size(name="llama2-7b", num_layers=32, embed_dim=4096, hidden_dim=11008)
TINY = Size(
    name="tiny", num_layers=2, embed_dim=32, hidden_dim=48, rank=16, sweep_ranks=(8,), sweep_top_ks=(1, 2),
    repeats=5, sweep_repeats=5, seconds=1e-3, checked_rows=8, ceiling_elements=2**12, matmul_dim=64,
)  # fmt: skip


def simple_merge(weights: Weights, a: Weights, b: Weights, terms: Terms, pristine: Weights | None) -> Weights:
    """One call per layer and linear."""
    merge, merged = jax.jit(merge_layer), dict(weights)
    for name, w in weights.items():
        for layer in range(w.shape[0]):
            base = (merged if pristine is None else pristine)[name][layer]
            w = merged[name].at[layer].set(merge(base, a[name][layer], b[name][layer], terms))
            # one after the other, or XLA makes the products of all layers before it adds the first
            merged[name], terms = jax.lax.optimization_barrier((w, terms))
    return merged


def merge_function(implementation: str) -> Callable[..., Weights]:
    if implementation == "simple":
        return simple_merge
    return lambda weights, a, b, terms, pristine: sgmm(
        weights, a, b, terms, pristine=pristine, implementation=implementation
    )


def terms_of(mode: str, top_k: int, slots: int) -> Terms:
    """The products of a mode, filled up with coefficients of 0."""
    gates = 1 / jnp.arange(1.5, top_k + 1)
    gates /= gates.sum()
    start = top_k - (mode == "one shared")
    current, previous = ((jnp.asarray(EXPERT_ORDER[i : i + top_k]), gates) for i in (0, start))
    terms = golden_terms(*current, SCALE) if mode == "golden" else switch_terms(previous, current, SCALE)
    padding = (0, slots - len(terms.experts))
    return Terms(jnp.pad(terms.experts, padding), jnp.pad(terms.coefficients, padding))


@partial(jax.jit, static_argnames="shape")
def draw(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    return (scale * jax.random.normal(key, shape)).astype(DTYPE)


def draw_all(size: Size, rank: int) -> tuple[Weights, Weights, Weights]:
    """W, A and B; the products are of the size of the weights, so that an error in them shows."""
    weights, a, b = {}, {}, {}
    lead, key = (size.num_layers, len(EXPERT_ORDER)), jax.random.key(2, impl="rbg")
    for name, (out_dim, in_dim) in size.shapes.items():
        key, *keys = jax.random.split(key, 4)
        weights[name] = draw(keys[0], (size.num_layers, out_dim, in_dim), 0.02)
        a[name] = draw(keys[1], (*lead, rank, in_dim), 0.6 * in_dim**-0.5)
        b[name] = draw(keys[2], (*lead, out_dim, rank), 0.2)
    return weights, a, b


@partial(jax.jit, static_argnames="rank")
def slice_rank(experts: list[Weights], rank: int) -> list[Weights]:
    a, b = experts
    return [{name: x[:, :, :rank] for name, x in a.items()}, {name: x[..., :rank] for name, x in b.items()}]


def compile_all(jobs: dict[Any, tuple[Callable[..., Any], bool, tuple[Any, ...]]]) -> dict[Any, Any]:
    """name → (function, whether its first argument is donated, arguments) becomes name → executable or exception."""

    def attempt(step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Exception as error:
            return error

    outcomes = {}
    with ThreadPoolExecutor(8) as pool:
        for name, (function, donates, arguments) in jobs.items():
            lowered = attempt(jax.jit(function, donate_argnums=0 if donates else ()).lower, *arguments)
            outcomes[name] = pool.submit(attempt, lambda x: x if isinstance(x, Exception) else x.compile(), lowered)
    return {name: future.result() for name, future in outcomes.items()}


def measure(
    size: Size, row: dict[str, Any], executable: Any, checker: Any, pristine: Weights, a: Weights, b: Weights, slots: int,
    repeats: int, copy: float,
) -> dict[str, Any]:  # fmt: skip
    """`row`, the configuration to run, with its errors and times, or with the error that prevented them."""
    base, top_k = pristine if row["mode"] == "golden" else None, row["top_k"]
    products = {"golden": top_k, "switch": 2 * top_k, "one shared": 2 * top_k - 1}[row["mode"]]
    dims = [w.shape[1:] for w in pristine.values()]
    elements = size.num_layers * sum(out_dim * in_dim for out_dim, in_dim in dims)
    factors = size.num_layers * sum(map(sum, dims)) * row["rank"] * products
    moved, flops = (2 * elements + factors) * jnp.dtype(DTYPE).itemsize, 2 * elements * row["rank"] * products
    row = row | {"products": products, "gigabytes": moved / 1e9, "flop_per_byte": flops / moved}
    try:
        for outcome in (executable, checker):
            if isinstance(outcome, Exception):
                raise outcome
        terms, checked = (terms_of(row["mode"], top_k, n) for n in (slots, CHECKED_SLOTS))
        memory = executable.memory_analysis()
        row |= {"aliased_gb": memory.alias_size_in_bytes / 1e9, "temporary_gb": memory.temp_size_in_bytes / 1e9}
        poison = partial(jnp.full_like, fill_value=jnp.nan)  # golden must write everything and read nothing of it
        weights = {name: jnp.copy(w) if base is None else poison(w) for name, w in pristine.items()}
        weights = executable(weights, a, b, terms, base)
        row["wrong_elements"] = int(checker(weights, pristine, a, b, checked))
        row |= errors(size.num_layers // 2, size.checked_rows, weights, pristine, a, b, terms)
        worse = any(not row[f"{x}_error"] <= 1.02 * row[f"{x}_error_of_rounding"] for x in ("max", "relative"))
        row["wrong"] = worse or row["wrong_elements"] > 0
        if row["wrong"]:
            return row
        timing, _ = time_calls(
            lambda w: executable(w, a, b, terms, base), weights, seconds=size.seconds, repeats=repeats
        )
    except Exception as error:
        return row | {"error": first_line(error)}
    speed = moved / timing.ms / 1e9
    return row | {
        "ms": timing.ms, "spread_ms": timing.spread_ms, "repeats": repeats, "calls_per_repeat": timing.calls,
        "tb_per_s": speed, "percent_of_copy": 100 * speed / copy, "tflops": flops / timing.ms / 1e9,
    }  # fmt: skip


def measure_all(
    size: Size, rows: list[dict[str, Any]], weights: Weights, experts: list[Weights], repeats: int, copy: float
) -> Iterator[dict[str, Any]]:
    """`measure` for rows of (targets, mode, implementation, rank, top_k), the ranks together.

    One executable serves several top_k, and both kinds of switch: it has slots for 2, 4 or 8 products, and those
    too many get a coefficient of 0.
    """

    def arrays(row: dict[str, Any], a: Weights, b: Weights) -> tuple[Weights, Weights, Weights]:
        names = size.targets[row["targets"]]
        return {n: weights[n] for n in names}, {n: a[n] for n in names}, {n: b[n] for n in names}

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        golden = row["mode"] == "golden"
        most = row["top_k"] if golden else 2 * row["top_k"]
        slots = next(n for n in (2, 4, CHECKED_SLOTS) if n >= most)
        return row["rank"], row["targets"], row["implementation"], golden, slots

    jobs: dict[Any, Any] = {}
    for row in rows:
        key = rank, targets, implementation, golden, slots = place(row)
        w, a, b = arrays(row, *jax.eval_shape(partial(slice_rank, rank=rank), experts))
        terms, checked = terms_of("golden", 1, slots), terms_of("golden", 1, CHECKED_SLOTS)
        jobs[key] = merge_function(implementation), True, (w, a, b, terms, w if golden else None)
        jobs[rank, targets] = wrong_elements, False, (w, w, a, b, checked)
    compiled = compile_all(jobs)
    rank, sliced = 0, experts
    for row in rows:
        if row["rank"] != rank:
            del sliced
            rank = row["rank"]
            sliced = slice_rank(experts, rank)
        key = place(row)
        row = measure(size, row, compiled[key], compiled[key[:2]], *arrays(row, *sliced), key[-1], repeats, copy)
        print(log_line(row), flush=True)
        yield row


def table_rows(size: Size, implementations: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"targets": targets, "mode": mode, "implementation": implementation, "rank": size.rank, "top_k": size.top_k}
        for targets in size.targets
        for mode in MODES
        for implementation in (*implementations, *(("simple",) if mode == "golden" else ()))
    ]


def sweep_rows(size: Size, implementation: str) -> list[dict[str, Any]]:
    return [
        {"targets": targets, "mode": mode, "implementation": implementation, "rank": rank, "top_k": top_k}
        for rank in size.sweep_ranks
        for targets in size.targets
        for mode in MODES[:2]
        for top_k in size.sweep_top_ks
    ]


def compare_with_simple(rows: list[dict[str, Any]]) -> None:
    simple = {(row["targets"], row["mode"]): row.get("ms") for row in rows if row["implementation"] == "simple"}
    for row in rows:
        if "ms" in row and (ms := simple.get((row["targets"], row["mode"]))):
            row["speedup_over_simple"] = ms / row["ms"]


def run(
    size: Size, out: Path, command: str, implementations: tuple[str, ...] = IMPLEMENTATIONS, swept: str = "pallas"
) -> dict[str, Any]:
    """Measure, write the three files, print the table. Raises `SystemExit` if a result was wrong."""
    watch = Stopwatch()
    ceilings = measure_ceilings(size.ceiling_elements, size.matmul_dim, seconds=size.seconds, repeats=size.repeats)
    result: dict[str, Any] = facts() | {
        "command": command, "size": size.name, "num_experts": len(EXPERT_ORDER), "ceilings": ceilings, "rows": [],
        "sweep": [],
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    copy, rows = result["ceilings"]["best_copy"], result["rows"]
    try:
        weights, *experts = draw_all(size, max(size.rank, *size.sweep_ranks))
        rows.extend(measure_all(size, table_rows(size, implementations), weights, experts, size.repeats, copy))
        compare_with_simple(rows)
        sweep = sweep_rows(size, swept)
        result["sweep"].extend(measure_all(size, sweep, weights, experts, size.sweep_repeats, copy))
    finally:
        result["seconds"] = round(watch.seconds, 1)
        write_json(out / "sgmm.json", result)
        (out / "sgmm.md").write_text(to_markdown(result))
    plot(result, out / "sgmm.png")
    print("\n".join(["", *map(log_line, rows), f"{result['seconds']} s"]))
    wrong = [log_line(row) for row in (*rows, *result["sweep"]) if row.get("wrong")]
    if wrong:
        raise SystemExit("\n".join([f"{len(wrong)} wrong results:", *wrong]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of sgmm.json, sgmm.md and sgmm.png")
    parser.add_argument("--quick", action="store_true", help="a sweep of three points only")
    arguments = parser.parse_args()
    size = replace(LLAMA2_7B, sweep_ranks=(16, 64, 128), sweep_top_ks=(2,), repeats=5) if arguments.quick else LLAMA2_7B
    run(size, arguments.out, command_line("benchmarks.kernels.sgmm"))


if __name__ == "__main__":
    main()
