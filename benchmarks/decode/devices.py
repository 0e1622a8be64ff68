"""A step of one row by tensor parallelism beside one device: `--part devices`, each model, strategy and number of devices in
a process of its own, so that one that fails or hangs costs no other.

    python -m benchmarks.decode.devices --job JOB.json --result RESULT.json

Weights are made in their shards. First correct: the logits of the model's first layers on all devices must be about as close
to those in float32 as those of one device are. Then the time of a step of the whole model, with its bytes. The megakernel is
asked for, also where it is no default; what it or the mesh refuses is the row's error, and so is too little memory.
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
STRATEGIES = ("fused", "unmerged")
SHARDED_ONLY = ("llama2-70b",)
"""Sizes that one device does not hold."""


def jobs_of_devices(size: str, devices: int, quantize: list[str]) -> list[Job]:
    """The jobs of `devices` devices, and those of one. 7B shapes, and on four devices or more 70B shapes too."""
    sizes = [size] if size != "llama2-7b" or devices < 4 else [size, "llama2-70b"]
    places = [
        {
            "size": name, "method": method, "targets": targets, "quantize": form, "devices": count,
            "strategy": strategy + (f"-{form}" if form else ""),
        }
        for name in sizes
        for form in (None, *quantize)
        for method, targets in (("backbone", "-"), ("adafuse", "all7"))
        for strategy in STRATEGIES
        for count in ((devices,) if name in SHARDED_ONLY else (1, devices))
    ]  # fmt: skip
    return [
        Job(
            name="-".join(map(str, (p["size"], p["method"], p["quantize"] or "bf16", p["devices"], p["strategy"]))),
            module="benchmarks.decode.devices", settings=p,
        )
        for p in places
    ]  # fmt: skip


def is_finished(row: dict[str, Any]) -> bool:
    """Return whether a row has its result, which may be a refusal, or that a device has too little memory."""
    error = row.get("error", "")
    return "ms" in row or error.startswith(UserError.__name__) or "RESOURCE_EXHAUSTED" in error


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


def engine_of(job: dict[str, Any], model: Backbone, adapter: Any) -> Engine:
    """Raises `UserError` if the strategy cannot run."""
    strategy = job["strategy"].partition("-")[0]
    if strategy == "fused" and (reason := fused_unsupported_reason(model, adapter=adapter)):
        raise UserError(f"no megakernel: {reason}")
    return Engine(model, adapter, strategy=strategy, eos_ids=())


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


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Errors of the logits on one device and on all, in norms of the exact ones, of the first layers. One device decodes
    unfused where the megakernel cannot run on it."""
    shapes = SIZES[job["size"]]
    shapes = replace(shapes, num_layers=min(CHECKED_LAYERS, shapes.num_layers))
    sharded = engine_of(job, *make(job, shapes, mesh_over(job, shapes)))
    model, adapter = make(job, shapes, None)
    right = exact(model, adapter)

    def error(engine: Engine) -> float:
        found = logits_of(engine.backend.for_batch(1))
        return float(np.linalg.norm(found - right) / np.linalg.norm(right))

    try:
        alone = engine_of(job, model, adapter)
    except UserError:
        alone = Engine(model, adapter, strategy="unmerged", eos_ids=())
    off, off_one = error(sharded), error(alone)
    return {"logits_off": off, "logits_off_one": off_one, "correct": off <= TOLERANCE * off_one}


def measure(job: dict[str, Any], report: Report) -> None:
    """`job`: size, method, targets, quantize, devices, strategy."""
    runtime.set_up()
    if jax.device_count() < job["devices"]:
        raise SystemExit(f"{job['devices']} devices are needed, and there are {jax.device_count()}")
    row = {name: job[name] for name in ("size", "method", "targets", "devices", "quantize", "strategy")}
    try:
        row |= measure_step(job)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        row["error"] = first_line(error)
    print(f"  {row}", flush=True)
    report({"devices": [row]})


def measure_step(job: dict[str, Any]) -> dict[str, Any]:
    shapes = SIZES[job["size"]]
    context = TINY_CONTEXT if job["size"] == "tiny" else CONTEXT
    mesh = mesh_over(job, shapes)
    found = check(job) if mesh is not None else {}
    engine = engine_of(job, *make(job, shapes, mesh))
    suffix = f"-{job['quantize']}" if job["quantize"] else ""
    moved = costs(shapes, job["method"], job["targets"], f"unmerged{suffix}", 1, context)
    ms = time_steps(engine.backend, 1, context)
    return found | {"bytes_gb": moved.bytes_gb, "ms": ms, "peak_gib": runtime.peak_device_gib()}


if __name__ == "__main__":
    run_as_job(__doc__, measure, facts)
