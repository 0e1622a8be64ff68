"""Run by test_tensor_parallel.py in a process with several CPU devices: tokens with and without tensor parallelism."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import jax
from goldens.tiny_models import CASES, write_model_dir
from test_adapters import family_case, random_adapter
from test_engine import generate, prompt_of
from test_methods import FEW, random_method

from adafuse_jax import load_backbone
from adafuse_jax.decoding import steps
from adafuse_jax.decoding.engine import Engine
from adafuse_jax.sharding import make_mesh, shard


def run(family: str, targets: tuple[str, ...], devices: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_model_dir(CASES[family_case(family)], Path(folder))
        model = load_backbone(folder, "float32")
    adapter = random_adapter(model.config, targets=targets)
    prompts = [prompt_of(model, n, seed=n) for n in (21, 9)]
    alone = generate(Engine(model, adapter, eos_ids=()), *prompts, n=12)
    mesh = make_mesh(devices, model.config)
    cut, cut_adapter = shard(model, mesh), shard(adapter, mesh)
    steps.decode_step.clear_cache()
    engine = Engine(cut, cut_adapter, eos_ids=())
    together = [generate(engine, *prompts, n=12) for _ in range(2)]

    def share(leaf) -> float:
        return leaf.addressable_shards[0].data.size / leaf.size

    linears = {
        name: share(getattr(cut.layers, name).weight[...])
        for name in ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
    }
    experts = {name: (share(e.A[...]), share(e.B[...])) for name, e in cut_adapter.experts.items()}
    return {
        "alone": alone, "together": together, "linears": linears, "experts": experts,
        "programs": steps.decode_step._cache_size(),
    }  # fmt: skip


def run_methods(family: str, devices: int) -> dict[str, bool]:
    """Method and strategy → whether the devices together give the tokens of one."""
    with tempfile.TemporaryDirectory() as folder:
        write_model_dir(CASES[family], Path(folder))
        model = load_backbone(folder, "float32")
    mesh, same = make_mesh(devices, model.config), {}
    prompts = [prompt_of(model, n, seed=n) for n in (11, 9)]
    few = FEW | {"mola": FEW["mola"] | {"experts_per_layer": (2, 4)}}
    for method, strategy in (("lora", "merged"), ("mola", "unmerged"), ("pesc", "unmerged")):
        adapter = random_method(method, model.config, **few[method])
        alone = generate(Engine(model, adapter, eos_ids=()), *prompts, n=6)
        engine = Engine(shard(model, mesh), shard(adapter, mesh), strategy=strategy, eos_ids=())
        same[f"{method} {strategy}"] = generate(engine, *prompts, n=6) == alone
    return same


if __name__ == "__main__":
    assert jax.device_count() >= 2
    family, what, devices = sys.argv[1:]
    found = (
        run_methods(family, int(devices)) if what == "methods" else run(family, tuple(what.split(",")), int(devices))
    )
    print(json.dumps(found))
