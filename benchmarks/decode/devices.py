"""A step of one row by tensor parallelism beside one device: `--part devices`, each model and number of devices in a process
of its own.

    python -m benchmarks.decode.devices --job JOB.json --result RESULT.json

Weights are made in their shards. First correct: the logits of the model's first layers on all devices must be about as close
to those in float32 as those of one device are. Then the time of a step of the whole model, with its bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.backends.megakernel import fused_unsupported_reason
from adafuse_jax.inference.backends.unfused import Unfused
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.state import DecodeState, cache_length
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.quantised import LAYOUTS
from adafuse_jax.parallel.mesh import make_mesh, mesh_of, place_state
from benchmarks.common.jobs import Job, Report, run_as_job
from benchmarks.common.records import facts, first_line
from benchmarks.decode.costs import SIZES, Shapes, costs
from benchmarks.decode.models import (
    adapter_config,
    in_float32,
    model_config,
    place_on,
    random_adapter,
    random_backbone,
)
from benchmarks.decode.rows import time_steps

CONTEXT, TINY_CONTEXT = 236, 16
CHECKED_LAYERS, CHECKED_TOKENS = 4, 8
TOLERANCE = 1.5
"""Largest error of the logits over that of one device: partial sums are rounded and added in another order."""
SHARDED_ONLY = ("llama2-70b",)
"""Sizes that one device does not hold."""


def jobs_of_devices(size: str, devices: int, quantize: list[str]) -> list[Job]:
    """The jobs of `devices` devices, and those of one. 7B shapes, and on four devices or more 70B shapes too."""
    sizes = [size] if size != "llama2-7b" or devices < 4 else [size, "llama2-70b"]
    places = [
        {"size": name, "method": method, "targets": targets, "quantize": form, "devices": count}
        for name in sizes
        for form in (None, *quantize)
        for method, targets in (("backbone", "-"), ("adafuse", "all7"))
        for count in ((devices,) if name in SHARDED_ONLY else (1, devices))
    ]
    return [
        Job(
            name="-".join(map(str, (p["size"], p["method"], p["quantize"] or "bf16", p["devices"]))),
            module="benchmarks.decode.devices", settings=p,
        )
        for p in places
    ]  # fmt: skip


def make(job: dict[str, Any], shapes: Shapes, mesh: Mesh | None) -> tuple[Backbone, Any]:
    """The backbone and its adapter, the same on every mesh."""
    config, place = model_config(shapes), place_on(mesh)
    model = random_backbone(config, quantize=job["quantize"], place=place)
    if job["method"] == "backbone":
        return model, None
    return model, random_adapter(adapter_config(shapes, job["targets"]), config, place=place)


def mesh_over(job: dict[str, Any], shapes: Shapes) -> Mesh | None:
    layout = LAYOUTS[job["quantize"]] if job["quantize"] else None
    return make_mesh(job["devices"], model_config(shapes), layout) if job["devices"] > 1 else None


def strategies(model: Backbone, adapter: Any) -> list[str]:
    reason = fused_unsupported_reason(model, adapter=adapter)
    if reason is None:
        return ["fused", "unmerged"]
    print(f"  no megakernel: {reason}", flush=True)
    return ["unmerged"]


def text_step(backend: Backend, batch: int) -> tuple[Any, KVCache]:
    """(reads, token [B], position [B], cache) → logits [B, V] and cache, jitted; and the cache before the first token."""
    model = backend.model
    state, mesh = DecodeState.empty(model.config, batch, cache_length(CHECKED_TOKENS), model.dtype), mesh_of(model)
    state = state if mesh is None else place_state(state, mesh)
    hold = jnp.zeros(batch, bool)
    step = jax.jit(lambda reads, token, position, cache: backend.step(reads, None, token, position, cache, hold)[::2])
    return step, state.cache


def logits_of(backend: Backend, batch: int = 1, step: Any = None) -> np.ndarray:
    """[tokens, B, V] of texts, one step a token. `step`: that of `text_step`, compiled."""
    jitted, cache = text_step(backend, batch)
    found, step = [], step or jitted
    for position in range(CHECKED_TOKENS):
        token = (7 * position + 3 + jnp.arange(batch, dtype=jnp.int32)) % backend.model.config.vocab_size
        logits, cache = step(backend.reads, token, jnp.full(batch, position, jnp.int32), cache)
        found.append(np.asarray(logits, np.float64))
    return np.stack(found)


def exact(model: Backbone, adapter: Any) -> np.ndarray:
    """Logits in float32."""
    with jax.default_matmul_precision("highest"):
        return logits_of(Unfused(*in_float32((model, adapter))))


def check(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Strategy → errors of the logits on one device and on all, in norms of the exact ones, of the first layers."""
    shapes = SIZES[job["size"]]
    shapes = replace(shapes, num_layers=min(CHECKED_LAYERS, shapes.num_layers))
    alone = make(job, shapes, None)
    right = exact(*alone)

    def error(model: Backbone, adapter: Any, strategy: str) -> float:
        found = logits_of(Engine(model, adapter, strategy=strategy, eos_ids=()).backend.for_batch(1))
        return float(np.linalg.norm(found - right) / np.linalg.norm(right))

    sharded = make(job, shapes, mesh_over(job, shapes))
    errors = {}
    for strategy in strategies(*sharded):
        of_one = strategy if strategy in strategies(*alone) else "unmerged"
        errors[strategy] = {"one": error(*alone, of_one), "all": error(*sharded, strategy)}
    return errors


def measure(job: dict[str, Any], report: Report) -> None:
    """`job`: size, method, targets, quantize, devices."""
    runtime.set_up()
    shapes, found = SIZES[job["size"]], []
    context = TINY_CONTEXT if job["size"] == "tiny" else CONTEXT
    if jax.device_count() < job["devices"]:
        raise SystemExit(f"{job['devices']} devices are needed, and there are {jax.device_count()}")
    place = {name: job[name] for name in ("size", "method", "targets", "devices", "quantize")}
    try:
        mesh = mesh_over(job, shapes)
        errors = check(job) if mesh is not None else {}
        model, adapter = make(job, shapes, mesh)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        report({"devices": [place | {"strategy": "-", "error": first_line(error)}]})
        return
    suffix = f"-{job['quantize']}" if job["quantize"] else ""
    for strategy in strategies(model, adapter):
        engine = Engine(model, adapter, strategy=strategy, eos_ids=())
        row = place | {"strategy": engine.strategy + suffix}
        row["bytes_gb"] = costs(shapes, job["method"], job["targets"], f"unmerged{suffix}", 1, context).bytes_gb
        row["ms"] = time_steps(engine.backend, 1, context)
        if off := errors.get(strategy):
            row |= {
                "logits_off": off["all"],
                "logits_off_one": off["one"],
                "correct": off["all"] <= TOLERANCE * off["one"],
            }
        row["peak_gib"] = runtime.peak_device_gib()
        found.append(row)
        print(f"  {row}", flush=True)
        report({"devices": found})


if __name__ == "__main__":
    run_as_job(__doc__, measure, facts)
