"""Run by test_mesh_training.py in a process with eight CPU devices: training over meshes of them, and over one."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny
from flax import nnx
from safetensors.numpy import load_file
from training_batches import as_batch, config, examples
from training_runs import train_here

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.checkpoints import placement
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.placement import Stacked
from adafuse_jax.data.packing import Rows, pack
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.layout import ONE_DEVICE
from adafuse_jax.parallel.layout import MeshLayout
from adafuse_jax.parallel.mesh import training_mesh
from adafuse_jax.training.initial import initial_state
from adafuse_jax.training.optimizer import make_optimizer
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import train_step

NUM_LAYERS, BATCH, LENGTH = 3, 8, 32
MODEL = ModelConfig(
    model_type="llama", vocab_size=96, embed_dim=32, hidden_dim=48, num_layers=NUM_LAYERS, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position_embeddings=256, norm_eps=1e-5, mlp_bias=True, tie_word_embeddings=True,
)  # fmt: skip
TARGETS = ("v_proj", "down_proj")
METHODS = {
    "adafuse": AdapterConfig(targets=TARGETS, num_experts=4, rank=2, top_k=2, alpha=4.0, dropout=0.0),
    "lora": AdapterConfig(adapter="lora", targets=TARGETS, rank=2, alpha=4.0, dropout=0.1),
    "full": AdapterConfig(adapter="full"),
}
WHOLE_STACK = re.compile(rf"\w+\[{NUM_LAYERS},(?:32,32|16,32|48,32|32,48|4,2,32|4,2,48|4,16,2|4,32,2)\]")
"""The type of a linear's weights or factors of all layers that is not sharded, in the text of a program."""


def steps_on(method: str, mesh_text: str, num_steps: int = 3) -> dict[str, Any]:
    """Metrics of steps of two micro-batches of packed rows, the weights after them, and the stacks of weights that a device
    holds whole."""
    mesh = training_mesh(mesh_text, MODEL, BATCH)
    layout = ONE_DEVICE if mesh is None else MeshLayout(mesh)
    optimizer = make_optimizer(config(batch_size=BATCH, grad_accum=2, learning_rate=1e-2), num_steps)

    @jax.jit
    def begin() -> Any:
        model = Backbone(MODEL, rngs=nnx.Rngs(0))
        state = initial_state(METHODS[method], model, None, optimizer, Phases(), jax.random.key(1))
        return layout.state(model), layout.state(state)

    model, state = begin()
    rows = pack(examples(model, [LENGTH // 3] * 6 * BATCH), LENGTH, packing=True)
    some = Rows(*(getattr(rows, field.name)[: 2 * BATCH] for field in dataclasses.fields(Rows)))
    mine = layout.rows(BATCH)
    local = jax.tree.map(lambda x: x[:, mine.start : mine.stop], as_batch(some, 2))
    batch = layout.batch(local, BATCH, axis=1)
    step = train_step.lower(state, model, batch, optimizer=optimizer, remat="none", layout=layout).compile()
    lines = []
    for _ in range(num_steps):
        state, metrics = step(state, model, batch)
        lines.append([float(metrics[name]) for name in ("loss", "grad_norm", "tokens")])
    weights = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state.adapter)}
    return {"lines": lines, "weights": weights, "whole": sorted(set(WHOLE_STACK.findall(step.as_text())))}


def agreement(method: str, *meshes: str) -> dict[str, Any]:
    """Mesh → how far metrics and weights are from those of one device, relative to the largest of each; and whole stacks."""
    alone, found = steps_on(method, "fsdp=1"), {}

    def distance(x: Any, y: Any) -> float:
        return float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max())

    for mesh in meshes:
        together = steps_on(method, mesh)
        found[mesh] = {
            "metrics": distance(together["lines"], np.array(alone["lines"])),
            "weights": max(distance(together["weights"][name], y) for name, y in alone["weights"].items() if y.any()),
            "whole": together["whole"],
        }
    return {"alone": alone["lines"], "meshes": found}


def loading(folder: Path) -> dict[str, float]:
    """Largest part of the model that a device holds at any time while it is loaded over eight, and the most memory beyond
    the shards, in largest tensors. The first load of two compiles."""
    tiny.write_model(folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=2048)
    checkpoint = HFCheckpoint.open(folder)
    mesh = training_mesh("fsdp=8", checkpoint.config, 8)
    of_device: list[float] = []
    beyond: list[float] = []
    original = placement._set_layer

    def sampled(*arguments: Any) -> Any:
        result = original(*arguments)
        sizes = live_bytes()
        of_device.append(max(sizes.values()))
        beyond.append(anonymous_memory() - sum(sizes.values()))
        return result

    load_backbone(checkpoint, "float32", place=Stacked(mesh))
    gc.collect()  # modules are in cycles
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous_memory() - sum(live_bytes().values())
    placement._set_layer = sampled
    model = load_backbone(checkpoint, "float32", place=Stacked(mesh))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    largest = 4 * max(int(np.prod(shape)) for shape in checkpoint.tensors.shapes.values())
    return {"device": max(of_device) / total, "beyond": (max(beyond) - before) / largest, "samples": len(beyond)}


def live_bytes() -> dict[jax.Device, int]:
    """Bytes of all arrays on each device."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        for device in array.sharding.device_set:
            sizes[device] += int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
    return sizes


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def resumed(folder: Path) -> dict[str, Any]:
    """A run on eight devices, resumed from the middle on as many, on four and on one: adapters and held-out losses."""
    tiny.write_folder(folder)
    settings: dict[str, Any] = {
        "steps": 4, "checkpoint_every": 2, "batch_size": 8, "eval_every": 4, "max_length": 32, "targets": "v_proj",
    }  # fmt: skip

    def run(name: str, **changes: Any) -> list[Any]:
        summary = train_here(folder, folder / name, **settings | changes)
        return [summary["after"]["eval_loss"], load_file(folder / name / "adapter" / "adapter_model.safetensors")]

    loss, whole = run("run")
    found: dict[str, Any] = {"default": json.loads((folder / "run" / "train_config.json").read_text())["mesh"]}
    for mesh in ("fsdp=8", "fsdp=4", "fsdp=1"):
        shutil.copytree(folder / "run", folder / mesh)
        shutil.rmtree(folder / mesh / "checkpoints" / "4")
        again, adapter = run(mesh, mesh=mesh, resume=True)
        distances = {name: float(np.abs(adapter[name] - leaf).max()) for name, leaf in whole.items()}
        found[mesh] = {"loss": again - loss, "weights": max(distances.values())}
    return found


if __name__ == "__main__":
    assert jax.device_count() == 8
    what, *arguments = sys.argv[1:]
    if what == "agreement":
        print(json.dumps(agreement(*arguments)))
    else:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps({"loading": loading, "resumed": resumed}[what](Path(directory))))
