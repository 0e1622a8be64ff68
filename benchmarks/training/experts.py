"""Low-rank experts of one linear, forward and backward: dense products that gates select from, or products of the chosen
experts only.

    python -m benchmarks.training.experts --out benchmarks/results/nvidia_h200

writes experts.json and experts.md: milliseconds, with their spread, by tokens, number of experts E, rank R and top-k. The
gradients of both forms are compared first. The last column is what a training run takes for the shape. Times leave out the
grouping of the tokens, which a model does once for all of its linears.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adafuse_jax.adapters.low_rank import low_rank_product
from adafuse_jax.models.hooks import Routing
from benchmarks.common.records import command_line, facts, first_line, write_json
from benchmarks.common.reports import number, table
from benchmarks.common.timing import time_calls
from pallas_kernels.grouped_experts import grouped_product, saves

CASES = {
    "full": [
        (tokens, *case, (4096, 4096))
        for tokens in (2048, 8192)
        for case in ((8, 16, 2), (8, 64, 2), (16, 64, 2), (32, 32, 2), (64, 16, 2), (64, 16, 4), (128, 16, 4))
    ]
    + [(8192, 8, 64, 2, (4096, 11008)), (8192, 8, 64, 2, (11008, 4096))],
    "tiny": [(64, 4, 16, 2, (64, 128))],
}
"""Tokens, E, R, k, (in, out)."""
CALLS = 8
"""Linears in a program: the host starts one program for all of them."""
TOLERANCE = 2e-2
"""Relative error of bf16 products with sums in fp32, in another order."""


def dense(x: Float[Array, "T in"], a: Array, b: Array, routing: Routing) -> Array:
    """Products with all experts."""
    return low_rank_product(x[None], a, b, routing.dense_gates())[0]


def grouped(x: Float[Array, "T in"], a: Array, b: Array, routing: Routing) -> Array:
    """Products with the chosen experts."""
    assert routing.grouped is not None
    groups, gates = routing.grouped
    return grouped_product(x, a, b, gates, groups, 1.0, jax.default_backend() == "cpu")


def arguments_of(case: tuple[int, int, int, int, tuple[int, int]]) -> tuple[Array, Array, Array, Routing]:
    """Random inputs, experts and routing of a case."""
    tokens, num_experts, rank, top_k, (into, out) = case
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, into), jnp.bfloat16)
    a = jax.random.normal(keys[1], (num_experts, rank, into)) * into**-0.5
    b = jax.random.normal(keys[2], (num_experts, out, rank)) * rank**-0.5
    logits, chosen = jax.lax.top_k(jax.random.normal(keys[3], (1, tokens, num_experts)), top_k)
    routing = Routing(chosen, jax.nn.softmax(logits), jnp.zeros((1, tokens, num_experts)))
    return x, a, b, jax.jit(Routing.with_groups)(routing)


def both_passes(form: Callable[..., Array]) -> Callable[..., Any]:
    """The gradients of x, A and B, of `CALLS` linears."""

    def loss(x: Array, a: Array, b: Array, routing: Routing) -> Array:
        return jnp.sum(jnp.sin(form(x, a, b, routing).astype(jnp.float32)))

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    return jax.jit(lambda x, a, b, routing: [gradients(x, a * (1 + i / 8), b, routing) for i in range(CALLS)])


def measure(case: tuple[int, int, int, int, tuple[int, int]], repeats: int) -> dict[str, Any]:
    """Milliseconds of both forms, or the error of one that fails or differs."""
    arguments = arguments_of(case)
    row: dict[str, Any] = dict(zip(("tokens", "experts", "rank", "top_k", "widths"), case, strict=True))
    wanted = jax.tree.leaves(both_passes(dense)(*arguments))
    for name, form in (("dense", dense), ("grouped", grouped)):
        step = partial(both_passes(form), *arguments)
        try:
            errors = [
                float(jnp.linalg.norm((found - exact).astype(jnp.float32)) / jnp.linalg.norm(exact.astype(jnp.float32)))
                for found, exact in zip(jax.tree.leaves(step()), wanted, strict=True)
            ]
            if not max(errors) < TOLERANCE:
                raise ValueError(f"gradients differ from the dense ones by {max(errors):.2g}")
            timing, _ = time_calls(lambda _: step(), None, repeats=repeats, seconds=0.05)  # noqa: B023 - called at once
            row |= {f"{name}_ms": timing.ms / CALLS, f"{name}_spread_ms": timing.spread_ms / CALLS}
        except Exception as error:
            row[f"{name}_error"] = first_line(error)
    return row


def report(record: dict[str, Any]) -> str:
    lines = [f"# Experts of one linear, forward and backward: {record['device']}", "", f"    {record['command']}", ""]
    lines += ["Milliseconds of all E experts' products and of the chosen ones, medians ± spread; bf16.", ""]
    head = "tokens", "E", "R", "k", "in × out", "all experts", "chosen experts", "a run takes"
    rows = []
    for row in record["rows"]:
        times = [
            f"{number(row.get(f'{form}_ms'), '.3f')} ± {number(row.get(f'{form}_spread_ms'), '.3f')}"
            if f"{form}_ms" in row else row[f"{form}_error"]
            for form in ("dense", "grouped")
        ]  # fmt: skip
        sizes = row["tokens"], row["experts"], row["rank"], row["top_k"], " × ".join(map(str, row["widths"]))
        rows.append((*sizes, *times, "chosen" if saves(*sizes[:4]) else "all"))
    return "\n".join([*lines, *table(head, rows)])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of experts.json and experts.md")
    parser.add_argument("--size", choices=CASES, default="full")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(argv)
    record: dict[str, Any] = {"command": command_line("benchmarks.training.experts", argv), **facts(), "rows": []}
    for case in CASES[arguments.size]:
        record["rows"].append(measure(case, arguments.repeats))
        write_json(arguments.out / "experts.json", record)
        (arguments.out / "experts.md").write_text(report(record) + "\n", encoding="utf-8")
    print(report(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
