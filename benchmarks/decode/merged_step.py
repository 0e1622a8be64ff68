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

import jax
import jax.numpy as jnp

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.inference.backends.megakernel import Fused, fused_unsupported_reason
from adafuse_jax.inference.backends.merged import Merged, with_weights
from adafuse_jax.inference.config import Strategy
from adafuse_jax.inference.programs import DecodeState, decode_step
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache
from benchmarks.common.records import command_line, facts, write_json
from benchmarks.common.reports import table
from benchmarks.common.timing import Timing, time_calls, wait
from benchmarks.decode.costs import SIZES, Shapes
from benchmarks.decode.models import adapter_config, model_config, random_adapter, random_backbone
from benchmarks.decode.rows import NO_REPEATS

SLOTS, PROMPT = 512, 128
STRATEGIES: tuple[Strategy, ...] = ("golden", "switch")
HEAD = (
    "strategy", "backbone", "ms per token", "over the backbone", "adapted GB", "aliased GB", "temp GB", "pointers stay",
)  # fmt: skip


def fresh_state(config: Any, dtype: Any, batch: int = 1) -> DecodeState:
    """After a prompt; every row has a token of its own."""
    return DecodeState(
        cache=KVCache.empty(config, batch, SLOTS, dtype), token=1 + jnp.arange(batch, dtype=jnp.int32),
        position=jnp.full(batch, PROMPT, jnp.int32), done=jnp.zeros(batch, bool),
        seen=jnp.zeros((batch, config.vocab_size), bool), key=jax.random.split(jax.random.key(0), batch),
    )  # fmt: skip


def time_steps(
    step: Callable[[DecodeState, Merged | None], tuple[Any, DecodeState, Merged | None]],
    state: DecodeState,
    merged: Merged | None,
    steps: int,
    repeats: int,
) -> tuple[Timing, DecodeState, Merged | None]:
    """The times of chained steps, and the last state and weights. Each repeat begins after the prompt."""

    def restart(both: tuple[DecodeState, Merged | None]) -> tuple[DecodeState, Merged | None]:
        return replace(both[0], position=jnp.full_like(both[0].position, PROMPT)), both[1]

    timing, (state, merged) = time_calls(
        lambda both: step(*both)[1:], (state, merged), calls=steps, repeats=repeats, restart=restart
    )
    return timing, state, merged


def run(
    shapes: Shapes, steps: int, repeats: int, pointer_steps: int,
    report: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for the bare backbone and each strategy; `pointer_steps` more steps follow, before pointers are compared.

    `report` gets the rows so far after each."""
    config = model_config(shapes)
    model = random_backbone(config)
    adapter = random_adapter(adapter_config(shapes, "qv"), config)
    bare = with_weights(model, dict.fromkeys(adapter.config.targets))

    def arguments(strategy: Strategy | None, merged: Merged | None) -> tuple[Any, ...]:
        """None is the bare backbone."""
        weights, acting = (bare if strategy == "switch" else model), (None if strategy is None else adapter)
        return weights, acting, fresh_state(config, model.dtype), merged, NO_REPEATS

    def abstract(strategy: Strategy | None) -> Merged | None:
        if strategy is None:
            return None
        nothing = jax.eval_shape(lambda: Merged.nothing("golden", model, adapter))
        return replace(nothing, strategy=strategy)

    megakernels = {s: megakernel_of(model, None if s is None else adapter) for s in (None, *STRATEGIES)}
    lowered = {
        s: decode_step.lower(*arguments(s, abstract(s)), eos_ids=(), pad_id=0, fused=megakernel)
        for s, megakernel in megakernels.items()
    }
    with ThreadPoolExecutor(len(lowered)) as pool:
        compiled = dict(zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True))
    rows: list[dict[str, Any]] = []
    for strategy, step in compiled.items():
        merged = None if strategy is None else Merged.nothing(strategy, model, adapter)
        weights, acting, state, *_ = arguments(strategy, None)
        before = pointers(merged)
        if strategy == "switch":
            del model, weights  # its adapted weights are donated: from here on the step has the only ones
            weights = bare

        def advance(
            state: DecodeState,
            merged: Merged | None,
            step=step,
            weights=weights,
            acting=acting,
            megakernel=megakernels[strategy],
        ) -> tuple[Any, DecodeState, Merged | None]:
            return step(weights, acting, state, merged, NO_REPEATS, fused=megakernel)

        timing, state, merged = time_steps(advance, state, merged, steps, repeats)
        for _ in range(0 if merged is None else pointer_steps):
            _, state, merged = advance(state, merged)
        memory = step.memory_analysis()
        row = {
            "strategy": strategy or "backbone", "targets": "qv" if strategy else "-",
            "backend": "megakernel" if megakernels[strategy] else "unfused",
            "ms": timing.ms, "spread_ms": timing.spread_ms,
            "adapted_gb": adapted_bytes(merged) / 1e9, "alias_gb": memory.alias_size_in_bytes / 1e9,
            "temporary_gb": memory.temp_size_in_bytes / 1e9,
            "same_pointers": None if merged is None else before == pointers(merged),
            "steps": (repeats + 1) * steps + (0 if merged is None else pointer_steps),
        }  # fmt: skip
        row["overhead_pct"] = 100 * (row["ms"] / (rows[0]["ms"] if rows else row["ms"]) - 1)
        print(" | ".join(cells(row)), flush=True)
        rows.append(row)
        report(rows)
        del merged, weights, advance
    return rows


def megakernel_of(model: Backbone, adapter: AdaFuse | None) -> Fused | None:
    return None if fused_unsupported_reason(model) else Fused.of(model, adapter, merged=True)


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
