"""The whole decode step by strategy, at the shapes of Llama-2-7B on one GPU: time, memory, and whose buffers it writes.

    python -m benchmarks.decode.merged_step --out benchmarks/results/nvidia_h200

writes merged_step.json and merged_step.md. Random bfloat16 weights, adapters on q and v, 8 experts of rank 64, 2 of them per
token, batch 1, a cache of 512 slots. One step is gate → merge → backbone → sampling in one program (`decode_step`), compiled
ahead of time; its backbone is the megakernel where that can run, as in the engine. Steps are chained without waiting for
their tokens. `overhead` is over the bare backbone's step of this run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.backends.megakernel import Megakernel
from adafuse_jax.inference.backends.merged import Golden, Merged, Switch
from adafuse_jax.inference.backends.registry import choose_backend
from adafuse_jax.inference.programs import decode_step
from adafuse_jax.inference.state import DecodeState
from benchmarks.common.records import command_line, facts, write_json
from benchmarks.common.reports import table
from benchmarks.common.timing import Timing, time_calls, wait
from benchmarks.decode.costs import SIZES, Shapes
from benchmarks.decode.models import adapter_config, model_config, random_adapter, random_backbone
from benchmarks.decode.rows import running_state, step_settings

SLOTS, PROMPT = 512, 128
HEAD = (
    "strategy", "backbone", "ms per token", "over the backbone", "adapted GB", "aliased GB", "temp GB", "pointers stay",
)  # fmt: skip


def time_steps(
    backend: Backend, step: Any, state: DecodeState, steps: int, repeats: int
) -> tuple[Timing, Callable[[DecodeState], DecodeState], DecodeState]:
    """The times of chained steps of the compiled program `step`, one step as a function, and the last state. Each repeat
    begins after the prompt."""
    settings = step_settings(len(state.token))

    def advance(state: DecodeState) -> DecodeState:
        _, state, carry = step(backend.reads, backend.take_carry(), state, *settings)
        backend.put_carry(carry)
        return state

    def restart(state: DecodeState) -> DecodeState:
        return replace(state, position=jnp.full_like(state.position, PROMPT))

    timing, state = time_calls(advance, state, calls=steps, repeats=repeats, restart=restart)
    return timing, advance, state


def lower(backend: Backend, carry: Any, state: DecodeState) -> Any:
    settings = step_settings(len(state.token))
    return decode_step.lower(backend.step, backend.reads, carry, state, *settings, pad_id=0)


def run(
    shapes: Shapes, steps: int, repeats: int, pointer_steps: int,
    report: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for the bare backbone and each strategy; `pointer_steps` more steps follow, before pointers are compared.

    `report` gets the rows so far after each."""
    config = model_config(shapes)
    model = random_backbone(config)
    adapter = random_adapter(adapter_config(shapes, "qv"), config)
    # The last is donated the model's adapted weights.
    backends: list[Backend] = [choose_backend(None, model, None), Golden(model, adapter), Switch(model, adapter)]

    def fresh_state() -> DecodeState:
        return running_state(config, jnp.bfloat16, 1, SLOTS, PROMPT)

    lowered = [lower(backend, merged_of(backend), fresh_state()) for backend in backends]
    with ThreadPoolExecutor(len(lowered)) as pool:
        compiled = list(pool.map(lambda program: program.compile(), lowered))
    rows: list[dict[str, Any]] = []
    for backend, step in zip(backends, compiled, strict=True):
        merges, before = isinstance(backend, Golden), pointers(merged_of(backend))
        timing, advance, state = time_steps(backend, step, fresh_state(), steps, repeats)
        for _ in range(pointer_steps if merges else 0):
            state = advance(state)
        memory = step.memory_analysis()
        row = {
            "strategy": backend.strategy if merges else "backbone", "targets": "qv" if merges else "-",
            "backend": "megakernel" if uses_megakernel(backend) else "unfused",
            "ms": timing.ms, "spread_ms": timing.spread_ms,
            "adapted_gb": adapted_bytes(merged_of(backend)) / 1e9, "alias_gb": memory.alias_size_in_bytes / 1e9,
            "temporary_gb": memory.temp_size_in_bytes / 1e9,
            "same_pointers": before == pointers(merged_of(backend)) if merges else None,
            "steps": (repeats + 1) * steps + (pointer_steps if merges else 0),
        }  # fmt: skip
        row["overhead_pct"] = 100 * (row["ms"] / (rows[0]["ms"] if rows else row["ms"]) - 1)
        print(" | ".join(cells(row)), flush=True)
        rows.append(row)
        report(rows)
    return rows


def merged_of(backend: Backend) -> Merged | None:
    return backend.merged if isinstance(backend, Golden) else None


def uses_megakernel(backend: Backend) -> bool:
    return isinstance(backend, Megakernel) or (isinstance(backend, Golden) and backend.reads[2] is not None)


def pointers(merged: Merged | None) -> list[int]:
    return [] if merged is None else sorted(w.unsafe_buffer_pointer() for w in wait(merged.weights).values())


def adapted_bytes(merged: Merged | None) -> int:
    return 0 if merged is None else sum(w.nbytes for w in merged.weights.values())


def cells(row: dict[str, Any]) -> list[str]:
    text = "{strategy}|{backend}|{ms:.3f} ± {spread_ms:.3f}|{overhead_pct:+.1f}%|{adapted_gb:.2f}|{alias_gb:.2f}|"
    return (text + "{temporary_gb:.3f}|{same_pointers}").format(**row).split("|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of merged_step.json and merged_step.md")
    parser.add_argument("--size", choices=SIZES, default="llama2-7b")
    parser.add_argument("--steps", type=int, default=60, help="of one repeat")
    arguments = parser.parse_args()
    result = facts() | {"size": arguments.size, "command": command_line("benchmarks.decode.merged_step")}
    report = partial(write, arguments.out, result)
    run(SIZES[arguments.size], arguments.steps, repeats=5, pointer_steps=700, report=report)


def write(out: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write_json(out / "merged_step.json", result | {"rows": rows})
    lines = [
        "# The decode step by strategy", "",
        "{device}, JAX {jax}, `{command}`, {size}, bfloat16, q and v adapted.".format(**result), "",
        *table(HEAD, map(cells, rows)),
    ]  # fmt: skip
    (out / "merged_step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
