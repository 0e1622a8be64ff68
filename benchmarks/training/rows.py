"""One row of the table of training speed in a process of its own: AdaFuse or LoRA in this project's `train_step`.

    python -m benchmarks.training.rows --job JOB.json --result RESULT.json     # `benchmarks.training` does

Random weights of the shapes named, random tokens, full rows of `segments` equal segments. A row's numbers are of steps that
are enqueued one after the other, as `train.py` does; its losses are those of the first steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from adafuse_jax.adapters.adafuse import choose_products
from adafuse_jax.core import runtime
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
from benchmarks.common.records import facts
from benchmarks.common.timing import Stopwatch, time_calls
from benchmarks.decode.models import adapter_config, random_backbone
from benchmarks.training.profile import profile
from benchmarks.training.shapes import CURVE_STEPS, LEARNING_RATE, SHAPES, TrainingShapes

PROFILED_STEPS = 3


def model_config(shapes: TrainingShapes) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=shapes.vocab_size, embed_dim=shapes.embed_dim, hidden_dim=shapes.hidden_dim,
        num_layers=shapes.num_layers, num_heads=shapes.num_heads, num_kv_heads=shapes.num_kv_heads,
        head_dim=shapes.embed_dim // shapes.num_heads, tie_word_embeddings=shapes.tied, norm_eps=1e-5,
        max_position_embeddings=shapes.max_position_embeddings,
    )  # fmt: skip


def random_batch(vocab_size: int, batch: int, length: int, segments: int, seed: int) -> Batch:
    """Rows of `segments` equal segments without padding; every token but the first of a segment is a target."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (1, batch, length), dtype=np.int32)
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


def measure(job: dict[str, Any], report: Report) -> None:
    """`job`: size, method, targets, batch, length, remat, unroll, segments, steps, repeats, profile; mesh, for several
    devices; products, where they are not to be chosen; rank, where it is not the shapes'; quantize, of the
    backbone's linears."""
    shapes = SHAPES[job["size"]]
    backbone, adapter = (
        model_config(shapes),
        adapter_config(shapes, job["targets"], job.get("rank"), method=job["method"]),
    )
    adapter = replace(adapter, dropout=0.0)  # as the peers
    optimizer = constant_rate_optimizer()
    initial = partial(initial_state, adapter, optimizer=optimizer, phases=Phases(), key=jax.random.key(0))
    mesh = training_mesh(job.get("mesh", "fsdp=1"), backbone, job["batch"])
    layout = ONE_DEVICE if mesh is None else MeshLayout(mesh)
    options: dict[str, Any] = {
        "remat": job["remat"],
        "unroll": job["unroll"],
        "max_segments": job["segments"],
        "layout": layout,
    }
    batches = [random_batch(shapes.vocab_size, job["batch"], job["length"], job["segments"], seed) for seed in range(4)]
    batches = [layout.batch(batch, job["batch"], axis=1) for batch in batches]
    quantize = job.get("quantize")

    def make_model() -> Backbone:
        model = Backbone(backbone, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return model if quantize is None else quantised(model, LAYOUTS[quantize])

    model: Any = jax.eval_shape(make_model)
    state: Any = jax.eval_shape(initial, model, None)
    if "mesh" in job:  # the same weights on every mesh
        model = jax.jit(lambda: layout.state(make_model()))()
        state = jax.jit(lambda model: layout.state(initial(model, None)))(model)
    products = job.get("products", "dense")
    if job["method"] == "adafuse" and "mesh" not in job and "products" not in job:
        products, _ = choose_products(adapter, backbone, job["batch"] * job["length"], "bfloat16")
    options["forward"] = forward_with(products)
    watch = Stopwatch()
    compiled = train_step.lower(state, model, batches[0], optimizer=optimizer, **options).compile()
    compile_seconds = watch.seconds
    if "mesh" not in job:
        model = random_backbone(backbone, quantize=quantize)
        state = jax.jit(initial)(model, None)
    losses: list[Any] = []

    def step(state: TrainState) -> TrainState:
        state, metrics = compiled(state, model, batches[len(losses) % len(batches)])
        losses.append(metrics["loss"])
        return state

    timing, state = time_calls(step, state, repeats=job["repeats"], calls=job["steps"])
    tokens = job["batch"] * job["length"]
    found = {
        "ms": timing.ms, "spread_ms": timing.spread_ms, "tokens_per_second": 1e3 * tokens / timing.ms,
        "flops_4n": 4 * linear_parameters(backbone) * tokens, "compile_seconds": compile_seconds, "products": products,
        "peak_gib": runtime.peak_device_gib(), "losses": [float(loss) for loss in losses[:CURVE_STEPS]],
    }  # fmt: skip
    report(found)
    if job["profile"]:

        def run() -> None:
            nonlocal state
            for _ in range(PROFILED_STEPS):
                state = step(state)
            jax.block_until_ready(state)

        report(found | {"profile": profile(run, PROFILED_STEPS)})


def main() -> None:
    run_as_job(__doc__, measure, facts)


if __name__ == "__main__":
    main()
