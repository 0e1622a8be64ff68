"""Jobs of `benchmarks.decode` in JAX, each in a process of its own: ceilings, decoding rows, contexts, one layer.

    python -m benchmarks.decode.rows --job JOB.json --result RESULT.json

A row is timed through `Engine.generate`, which is what a user gets. Batches go from small to large, so that the peak of
the process is that of the row. Decoding is greedy among the tokens that the text does not have yet: a random model would
otherwise repeat one token, and its experts would never change.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import benchmarks.simple_merging  # noqa: F401 - registers the strategy
from adafuse_jax.core import runtime
from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.programs import advance
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.state import DecodeState, cache_length
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.parallel.mesh import mesh_of, place_state
from benchmarks.common.ceilings import measure_ceilings
from benchmarks.common.jobs import Report, run_as_job
from benchmarks.common.records import facts, first_line
from benchmarks.common.timing import Stopwatch, Timing, time_calls
from benchmarks.decode.costs import SIZES, costs
from benchmarks.decode.layer import measure_layer
from benchmarks.decode.models import adapter_config, model_config, random_adapter, random_backbone

NO_REPEATS = Sampling.of(repetition_penalty=1e6)


def time_rows(
    engine: Engine, batches: Iterable[Sequence[Sequence[int]]], new_tokens: int, seconds: float = 60.0
) -> dict[str, Any]:
    """Decode each batch of prompts, of as many as `seconds` allow. ms per step: the median and slowest less fastest."""
    steps, prefills, contexts, pairs, watch = [], [], [], [], Stopwatch()
    for seed, prompts in enumerate(batches):
        tokens = list(engine.generate(prompts, max_new_tokens=new_tokens, sampling=NO_REPEATS, seed=seed))
        assert len(tokens) == new_tokens, f"{len(tokens)} tokens came of {new_tokens}"
        prefills.append(1e3 * tokens[0].seconds)
        steps.append(sum(token.seconds for token in tokens[1:]) / (new_tokens - 1))
        contexts.append(statistics.mean(map(len, prompts)) + new_tokens / 2)
        pairs += [[np.sort(token.experts, axis=-1) for token in tokens if token.experts is not None]]
        if watch.seconds > seconds:
            break
    timing = Timing(repeats=tuple(steps))
    row = {
        "ms_per_token": timing.ms, "spread_ms": timing.spread_ms, "queries": len(steps),
        "new_tokens": new_tokens, "prefill_ms": statistics.median(prefills), "context": statistics.mean(contexts),
        "peak_gib": runtime.peak_device_gib(),
    }  # fmt: skip
    if pairs[0]:
        row["distinct_experts"] = float(np.mean([len(np.unique(chosen)) for of in pairs for chosen in of]))
        changed = [(a != b).any(-1) for of in pairs for a, b in pairwise(of)]
        row["experts_change_pct"] = 100 * float(np.mean(changed)) if changed else 0.0
    return row


def warm_up(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Compile; returns the seconds that took, with some tokens."""
    watch = Stopwatch()
    tokens = engine.generate(prompts, max_new_tokens=new_tokens, sampling=NO_REPEATS)
    for _ in zip(range(8), tokens, strict=False):
        pass
    tokens.close()  # type: ignore[attr-defined]
    return watch.seconds


def batches_of(prompts: Sequence[Sequence[int]], batch: int, count: int) -> list[list[Sequence[int]]]:
    """`count` batches; the prompts begin again when they are used up."""
    return [[prompts[(i * batch + j) % len(prompts)] for j in range(batch)] for i in range(count)]


def running_state(config: ModelConfig, dtype: Any, batch: int, length: int, position: int) -> DecodeState:
    """`position` tokens are in a cache of `length`. The rows' tokens differ, and so they use experts of their own."""
    state = DecodeState.empty(config, batch, length, dtype).with_seen(config.vocab_size)
    return replace(
        state, token=jnp.arange(batch, dtype=jnp.int32), position=jnp.full(batch, position, jnp.int32),
        done=jnp.zeros(batch, bool),
    )  # fmt: skip


def step_settings(batch: int) -> tuple[Sampling, jax.Array]:
    """The settings [B] and stop ids [B, 1] with which the engine decodes `NO_REPEATS`."""
    return jax.device_put(Sampling.stack([NO_REPEATS] * batch)), jnp.full((batch, 1), -1, jnp.int32)


def time_steps(backend: Backend, batch: int, context: int, steps: int = 40, repeats: int = 5) -> float:
    """ms of a step at `context` tokens in the cache. The steps are chained, and none of their tokens goes to the host."""
    backend, settings = backend.for_batch(batch), step_settings(batch)
    model = backend.model
    state, mesh = (
        running_state(model.config, model.dtype, batch, cache_length(context + steps), context),
        mesh_of(model),
    )
    del model  # with *switch* the steps are donated its weights

    def restart(state: DecodeState) -> DecodeState:
        state = replace(state, position=jnp.full(batch, context, jnp.int32))
        return state if mesh is None else place_state(state, mesh)

    timing, _ = time_calls(
        lambda state: advance(backend, state, *settings)[1],
        state,
        calls=steps,
        repeats=repeats,
        restart=restart,
    )
    backend.restore()
    return timing.ms


def measure_contexts(job: dict[str, Any], report: Report) -> None:
    """ms of a step of one row by the tokens in its cache, for the backbone and for the default with all linears adapted."""
    shapes, found = SIZES[job["size"]], []
    config = model_config(shapes)
    model = random_backbone(config)
    for method, targets in (("backbone", "-"), ("adafuse", "all7")):
        adapter = None if method == "backbone" else random_adapter(adapter_config(shapes, targets), config)
        engine = Engine(model, adapter, eos_ids=())
        for context in job["contexts"]:
            moved = costs(shapes, method, targets, engine.strategy, 1, context).bytes_gb
            row: dict[str, Any] = {"method": method, "targets": targets, "strategy": engine.strategy}
            row |= {"context": context, "bytes_gb": moved}
            row["ms"] = time_steps(engine.backend, 1, context)
            found.append(row)
            print("  {method} {targets}, {context} tokens: {ms:.3f} ms, {bytes_gb:.3f} GB".format(**row), flush=True)
            report({"contexts": found})


def measure_rows(job: dict[str, Any], report: Report) -> None:
    """Rows of one strategy and its targets, batch by batch; `report` gets all rows so far."""
    shapes, prompts, method = SIZES[job["size"]], job["prompts"], job["method"]
    strategy, targets = job["strategy"], job["targets"]
    name = " ".join(word for word in (method, strategy, targets) if word != "-")
    rows: list[dict[str, Any]] = []
    watch = Stopwatch()
    config = model_config(shapes)
    adapter = None if method == "backbone" else random_adapter(adapter_config(shapes, targets, None, method), config)
    words: list[Any] = strategy.split("-", 1)  # of a quantised model unmerged-int4 or fused-int4
    engine = Engine(
        random_backbone(config, quantize=words[1] or None if len(words) > 1 else None), adapter, eos_ids=(),
        strategy=words[0] or None,
    )  # fmt: skip
    del adapter
    print(f"  {name}: model made in {watch.seconds:.1f} s", flush=True)
    for batch in job["batches"]:
        row = {"method": method, "targets": targets, "strategy": strategy, "batch": batch}
        try:
            queries = batches_of(prompts, batch, job["queries"] if batch == 1 else job["batch_queries"])
            longest = max(queries, key=lambda rows: max(map(len, rows)))
            row["warm_up_s"] = warm_up(engine, longest, job["new_tokens"])
            row |= time_rows(engine, queries, job["new_tokens"], job["row_seconds"])
            row["step_ms"] = time_steps(engine.backend, batch, round(row["context"]))
            row["stall_pct"] = 100 * (row["ms_per_token"] / row["step_ms"] - 1)
            text = "{ms_per_token:.3f} ± {spread_ms:.3f} ms, {queries} queries, warm-up {warm_up_s:.0f} s".format(**row)
        except Exception as error:
            text = row["error"] = first_line(error)
        rows.append(row)
        print(f"  {name}, batch {batch}: {text}", flush=True)
        report({"rows": rows})


def report_ceilings(job: dict[str, Any], report: Report) -> None:
    report({"ceilings": measure_ceilings(job["elements"], job["matmul_dim"], seconds=job["seconds"])})


KINDS: dict[str, Callable[[dict[str, Any], Report], None]] = {
    "ceilings": report_ceilings, "rows": measure_rows, "contexts": measure_contexts, "layer": measure_layer,
}  # fmt: skip


def main() -> None:
    runtime.set_up()
    run_as_job(__doc__, lambda job, report: KINDS[job["kind"]](job, report), facts)


if __name__ == "__main__":
    main()
