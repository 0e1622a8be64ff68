"""Low-rank experts of one linear, forward and backward: dense products that gates select from, or products of the chosen
experts only.

    python -m benchmarks.training.experts --out benchmarks/results/nvidia_h200

prints milliseconds, with their spread, by number of experts, rank and top-k, and writes experts.json. `grouped` sorts every
token's k choices by expert and multiplies each expert's rows with `jax.lax.ragged_dot`; its outputs and gradients are
compared with the dense ones first. It decides whether the product of `adafuse_jax.adapters.low_rank` gets a second form.
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
from jaxtyping import Array, Float, Int

from adafuse_jax.adapters.low_rank import low_rank_product
from adafuse_jax.models.hooks import Routing
from benchmarks.common.records import command_line, facts, first_line, write_json
from benchmarks.common.timing import time_calls

SHAPES = {"full": (8192, 4096, 4096), "tiny": (48, 32, 40)}
"""Tokens, in and out."""
CASES = ((8, 64, 2), (16, 32, 2), (32, 32, 2), (64, 16, 2), (64, 16, 4), (128, 8, 4))
"""Experts E, rank R, top-k."""
TOLERANCE = 2e-2
"""Relative error of bf16 products with sums in fp32, in another order."""


def dense(x: Float[Array, "T in"], a: Array, b: Array, gates: Float[Array, "T k"], chosen: Int[Array, "T k"]) -> Array:
    """Products with all experts."""
    routing = Routing(chosen[None], gates[None], jnp.zeros((1, len(x), len(a))))
    return low_rank_product(x[None], a, b, routing.dense_gates())[0]


def grouped(
    x: Float[Array, "T in"], a: Array, b: Array, gates: Float[Array, "T k"], chosen: Int[Array, "T k"]
) -> Array:
    """Products with the chosen experts: rows sorted by expert, T·k of them."""
    order = jnp.argsort(chosen.ravel())
    token, sizes = order // chosen.shape[1], jnp.bincount(chosen.ravel(), length=len(a))
    h = jax.lax.ragged_dot(x[token], a.astype(x.dtype).swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)
    h = (h * gates.ravel()[order][:, None]).astype(x.dtype)
    y = jax.lax.ragged_dot(h, b.astype(x.dtype).swapaxes(1, 2), sizes)
    return jnp.zeros((len(x), b.shape[1]), x.dtype).at[token].add(y)


def arguments_of(shape: tuple[int, int, int], case: tuple[int, int, int]) -> tuple[Array, ...]:
    """Random inputs, experts, gates and choices of a case."""
    (tokens, into, out), (num_experts, rank, top_k) = shape, case
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, into), jnp.bfloat16)
    a = jax.random.normal(keys[1], (num_experts, rank, into)) * into**-0.5
    b = jax.random.normal(keys[2], (num_experts, out, rank)) * rank**-0.5
    logits, chosen = jax.lax.top_k(jax.random.normal(keys[3], (tokens, num_experts)), top_k)
    return x, a, b, jax.nn.softmax(logits), chosen


def measure(shape: tuple[int, int, int], case: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Milliseconds of both forms, or the error of one that fails or differs."""
    arguments = arguments_of(shape, case)

    def both_passes(form: Callable[..., Array]) -> Callable[..., Any]:
        def loss(x: Array, a: Array, b: Array, gates: Array, chosen: Array) -> Array:
            return jnp.sum(jnp.sin(form(x, a, b, gates, chosen).astype(jnp.float32)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))

    row: dict[str, Any] = dict(zip(("experts", "rank", "top_k"), case, strict=True))
    wanted = both_passes(dense)(*arguments)
    for name, form in (("dense", dense), ("grouped", grouped)):
        step = partial(both_passes(form), *arguments)
        try:
            errors = [
                float(jnp.linalg.norm((found - exact).astype(jnp.float32)) / jnp.linalg.norm(exact.astype(jnp.float32)))
                for found, exact in zip(step(), wanted, strict=True)
            ]
            if not max(errors) < TOLERANCE:
                raise ValueError(f"gradients differ from the dense ones by {max(errors):.2g}")
            timing, _ = time_calls(lambda _: step(), None, repeats=repeats, seconds=0.05)  # noqa: B023 - called at once
            row |= {f"{name}_ms": timing.ms, f"{name}_spread_ms": timing.spread_ms}
        except Exception as error:
            row[f"{name}_error"] = first_line(error)
    return row


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of experts.json")
    parser.add_argument("--size", choices=SHAPES, default="full")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(argv)
    rows = []
    for case in CASES:
        rows.append(measure(SHAPES[arguments.size], case, arguments.repeats))
        print(
            ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in rows[-1].items()
            ),
            flush=True,
        )
        write_json(
            arguments.out / "experts.json",
            {"command": command_line("benchmarks.training.experts", argv), **facts(), "rows": rows},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
