"""One row of the table of training speed in a process of its own: AdaFuse or LoRA in this project's `train_step`.

    python -m benchmarks.training.rows --job JOB.json --result RESULT.json     # `benchmarks.training` does

Random weights of the shapes named, random tokens, full rows of `segments` equal segments. A row's numbers are of steps that
are enqueued one after the other, as `train.py` does; its losses are those of the first steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jaxlib import xla_client

from adafuse_jax.adapters.adafuse import choose_products
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batch
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.layout import ONE_DEVICE
from adafuse_jax.models.quantised import LAYOUTS, quantised
from adafuse_jax.parallel.layout import MeshLayout
from adafuse_jax.parallel.mesh import training_mesh
from adafuse_jax.training.initial import initial_state
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import TrainState, forward_with, train_step
from adafuse_jax.training.utilisation import linear_parameters
from benchmarks.common.jobs import Report, run_as_job
from benchmarks.common.records import facts, first_line
from benchmarks.common.timing import Stopwatch, time_calls
from benchmarks.decode.models import adapter_config, place_on, random_backbone
from benchmarks.training.profile import profile
from benchmarks.training.shapes import CURVE_STEPS, LEARNING_RATE, SHAPES, TrainingShapes

PROFILED_STEPS = 3


def model_config(shapes: TrainingShapes) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=shapes.vocab_size, embed_dim=shapes.embed_dim, hidden_dim=shapes.hidden_dim,
        num_layers=shapes.num_layers, num_heads=shapes.num_heads, num_kv_heads=shapes.num_kv_heads or shapes.num_heads,
        head_dim=shapes.embed_dim // shapes.num_heads, tie_word_embeddings=shapes.tied, norm_eps=1e-5,
        max_position_embeddings=shapes.max_position_embeddings,
    )  # fmt: skip


def random_batch(vocab_size: int, batch: int, length: int, segments: int, seed: int, accum: int = 1) -> Batch:
    """Rows of `segments` equal segments without padding, in `accum` micro-batches of `batch`; every token but the first of a
    segment is a target."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (accum, batch, length), dtype=np.int32)
    ids = np.arange(length) * segments // length
    positions = np.arange(length) - np.searchsorted(ids, ids)
    rows = partial(np.broadcast_to, shape=tokens.shape)
    return Batch(
        tokens=tokens, loss_mask=rows(positions > 0), segment_ids=rows(ids.astype(np.int32) + 1),
        positions=rows(positions.astype(np.int32)),
    )  # fmt: skip


def constant_rate_optimizer(rate: float = LEARNING_RATE) -> optax.GradientTransformation:
    """The optimiser of the peers: AdamW of one learning rate on clipped gradients."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes of arrays that are placed so."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def described_devices(count: int) -> Sequence[jax.Device]:
    """GPUs of the kind of this process's first, which need not be there: programs can be compiled for them."""
    if jax.default_backend() != "gpu":
        raise UserError(
            f"{count} devices are needed; for absent ones programs are compiled where one of them is, a GPU"
        )
    target = xla_client.get_topology_for_devices(jax.devices()[:1]).target_config
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    return found.devices


def planned_gib(compiled: Any) -> float:
    """Memory of a device while the program runs, its arguments included, as the compiler has planned it."""
    plan = compiled.memory_analysis()
    total = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return round(total / 2**30, 3)


def measure(job: dict[str, Any], report: Report) -> None:
    """`job`: size, method, targets, batch, length, remat, unroll, segments, steps, repeats, profile; mesh, for several
    devices; accum, micro-batches of a step; only_compile, for `devices` that need not be there; products, where they are not
    to be chosen; rank, where it is not the shapes'; quantize, of the backbone's linears."""
    if "mesh" in job:
        runtime.set_up()  # before anything is compiled, or the cache is not used
    found: dict[str, Any] = {}

    def add(values: dict[str, Any]) -> None:
        found.update(values)
        report(found)

    try:
        measure_row(job, add)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        add({"error": first_line(error)})


def measure_row(job: dict[str, Any], add: Report) -> None:
    shapes = SHAPES[job["size"]]
    backbone, adapter = (
        model_config(shapes),
        adapter_config(shapes, job["targets"], job.get("rank"), method=job["method"]),
    )
    adapter = replace(adapter, dropout=0.0)  # as the peers
    optimizer = constant_rate_optimizer()
    initial = partial(initial_state, adapter, optimizer=optimizer, phases=Phases(), key=jax.random.key(0))
    only_compile = job.get("only_compile", False)
    is_planned = only_compile and job["devices"] > jax.device_count()
    devices = described_devices(job["devices"]) if is_planned else None
    mesh = training_mesh(job.get("mesh", "fsdp=1"), backbone, job["batch"], devices=devices)
    layout = ONE_DEVICE if mesh is None else MeshLayout(mesh)
    options: dict[str, Any] = {
        "remat": job["remat"],
        "unroll": job["unroll"],
        "max_segments": job["segments"],
        "layout": layout,
    }
    batches = [
        random_batch(shapes.vocab_size, job["batch"], job["length"], job["segments"], seed, job.get("accum", 1))
        for seed in range(4)
    ]
    if mesh is not None and only_compile:
        by_row = MeshLayout(mesh).sharding((None, "batch"))
        batches = [with_shardings(batch, jax.tree.map(lambda _: by_row, batch)) for batch in batches[:1]]
    else:
        batches = [layout.batch(batch, job["batch"], axis=1) for batch in batches]
    quantize = job.get("quantize")

    def make_model() -> Backbone:
        model = Backbone(backbone, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return model if quantize is None else quantised(model, LAYOUTS[quantize])

    model: Any = jax.eval_shape(make_model)
    state: Any = jax.eval_shape(initial, model, None)
    make_state, place = jax.jit(lambda model: layout.state(initial(model, None))), None
    if "mesh" in job:  # the same weights on every mesh, made in their shards
        place = place_on(mesh)
        model = with_shardings(model, jax.tree_util.tree_map_with_path(lambda path, _: place(path), model))
        state = with_shardings(state, make_state.lower(model).compile().output_shardings)
    products = job.get("products", "dense")
    if job["method"] == "adafuse" and "mesh" not in job and "products" not in job:
        products, _ = choose_products(adapter, backbone, job["batch"] * job["length"], "bfloat16")
    options["forward"] = forward_with(products)
    watch = Stopwatch()
    compiled = train_step.lower(state, model, batches[0], optimizer=optimizer, **options).compile()
    memory = {"planned_gib": planned_gib(compiled), "allocator_gib": runtime.device_limit_gib()}
    add({"compile_seconds": watch.seconds, "products": products} | memory)
    if only_compile:
        return
    model = random_backbone(backbone, quantize=quantize, place=place)
    state = make_state(model)
    losses: list[Any] = []

    def step(state: TrainState) -> TrainState:
        state, metrics = compiled(state, model, batches[len(losses) % len(batches)])
        losses.append(metrics["loss"])
        return state

    timing, state = time_calls(step, state, repeats=job["repeats"], calls=job["steps"])
    tokens = job.get("accum", 1) * job["batch"] * job["length"]
    add({
        "ms": timing.ms, "spread_ms": timing.spread_ms, "tokens_per_second": 1e3 * tokens / timing.ms,
        "flops_4n": 4 * linear_parameters(backbone) * tokens, "peak_gib": runtime.peak_device_gib(),
        "losses": [float(loss) for loss in losses[:CURVE_STEPS]],
    })  # fmt: skip
    if job["profile"]:

        def run() -> None:
            nonlocal state
            for _ in range(PROFILED_STEPS):
                state = step(state)
            jax.block_until_ready(state)

        add({"profile": profile(run, PROFILED_STEPS)})


def main() -> None:
    run_as_job(__doc__, measure, facts)


if __name__ == "__main__":
    main()
