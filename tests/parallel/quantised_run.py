"""Run by test_quantised_mesh.py in a process with two CPU devices: a quantised model over them, and over one."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from generation import generate, prompt_of
from goldens.tiny_models import CASES, write_model_dir
from random_models import random_adapter
from training_batches import as_batch, config, examples

from adafuse_jax import load_backbone
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.checkpoints.placement import Stacked
from adafuse_jax.data.packing import pack
from adafuse_jax.inference.engine import Engine
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.layout import ONE_DEVICE
from adafuse_jax.models.quantised import LAYOUTS, Quantize
from adafuse_jax.parallel.layout import MeshLayout
from adafuse_jax.parallel.mesh import make_mesh, shard, training_mesh
from adafuse_jax.training.initial import initial_state
from adafuse_jax.training.optimizer import make_optimizer
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import train_step

BATCH, LENGTH = 4, 16
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CASE = replace(CASES["llama_gqa_tied"], name="wide", config=CASES["llama_gqa_tied"].config | WIDE)


def shares(model: Any) -> dict[str, list[float]]:
    """The part of its codes and scales that a device has, by linear, and of the head."""
    weights = {name: getattr(model.layers, name).weight[...] for name in LINEARS} | {"lm_head": model.head}
    return {
        name: [x.addressable_shards[0].data.size / x.size for x in (w.codes, w.scales)] for name, w in weights.items()
    }


def loaded(folder: Path, quantize: Quantize, mesh: Any) -> tuple[Any, bool]:
    """The model over a mesh, and whether loading gives what sharding gives."""
    checkpoint = HFCheckpoint.open(folder).quantised(quantize, quantize_head=True)
    model = load_backbone(checkpoint, "float32", place=Stacked(mesh))
    wanted = shard(load_backbone(checkpoint, "float32"), mesh)
    pairs = [*zip(jax.tree.leaves(model), jax.tree.leaves(wanted), strict=True)]
    return model, all(x.sharding == y.sharding and np.array_equal(x, y) for x, y in pairs)


def decoding(folder: Path, quantize: Quantize) -> dict[str, Any]:
    alone = load_backbone(HFCheckpoint.open(folder).quantised(quantize, quantize_head=True), "float32")
    adapter = random_adapter(alone.config)
    mesh = make_mesh(2, alone.config, LAYOUTS[quantize])
    model, same = loaded(folder, quantize, mesh)
    prompts = [prompt_of(alone, n, seed=n) for n in (11, 6)]
    tokens = [
        generate(Engine(m, a, eos_ids=()), *prompts, n=8) for m, a in ((alone, adapter), (model, shard(adapter, mesh)))
    ]
    export_backbone(alone, folder / quantize, source=folder)
    stored = load_backbone(folder / quantize, place=Stacked(mesh))
    again = all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(stored), jax.tree.leaves(alone), strict=True))
    return {"same": same, "imported": again, "tokens": tokens, "shares": shares(model), "stored": shares(stored)}


def training(folder: Path, quantize: Quantize, mesh_text: str) -> dict[str, Any]:
    """Losses of steps over the devices and alone."""
    checkpoint, lines = HFCheckpoint.open(folder).quantised(quantize, quantize_head=True), []
    optimizer = make_optimizer(config(batch_size=BATCH, learning_rate=1e-2), 2)
    for text in (mesh_text, "fsdp=1"):
        mesh = training_mesh(text, checkpoint.config, BATCH, LAYOUTS[quantize])
        layout = ONE_DEVICE if mesh is None else MeshLayout(mesh)
        model = load_backbone(checkpoint, "float32", place=Stacked(mesh))
        settings = random_adapter(checkpoint.config, targets=("q_proj", "down_proj"), dropout=0.0).config

        def begin(model: Any, settings: Any = settings, layout: Any = layout) -> Any:
            state = initial_state(settings, model, None, optimizer, Phases(), jax.random.key(1))
            return layout.state(state)

        state = jax.jit(begin)(model)
        rows = pack(examples(model, [LENGTH] * BATCH), LENGTH, packing=True)
        mine = layout.rows(BATCH)
        local = jax.tree.map(lambda x, mine=mine: x[:, mine.start : mine.stop], as_batch(rows, 1))
        batch, losses = layout.batch(local, BATCH, axis=1), []
        for _ in range(2):
            state, metrics = train_step(state, model, batch, optimizer=optimizer, layout=layout)
            losses.append(float(metrics["loss"]))
        lines.append(losses)
        if text == mesh_text:
            found = shares(model)
    return {"losses": lines, "shares": found}


if __name__ == "__main__":
    directory = Path(tempfile.mkdtemp())
    write_model_dir(CASE, directory)
    report: dict[str, Any] = {
        "decode int4-g64": decoding(directory, "int4-g64"),
        "decode int8": decoding(directory, "int8"),
    }
    report |= {f"train {mesh}": training(directory, "int4-g64", mesh) for mesh in ("fsdp=2", "tensor=2")}
    print(json.dumps(report))
