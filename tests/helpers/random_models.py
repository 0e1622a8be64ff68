"""Tiny models of every family, and adapters whose experts and routers are random instead of new."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from goldens.tiny_models import CASES, write_model_dir

from adafuse_jax import AdaFuse, AdapterConfig, load_backbone
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.models.config import LINEARS, ModelConfig

POSITIONS = {
    "attention": ("q_proj", "v_proj"),
    "after_attention": ("o_proj", "down_proj"),
    "ffn": ("gate_proj", "up_proj", "down_proj"),
    "down": ("down_proj",),
    "all": LINEARS,
}
"""Target sets whose first linear has each of the four possible inputs x^1."""

FAMILIES = ("llama_gqa", "llama_bias", "mistral_window", "qwen2_window", "qwen3")


def family_case(name: str) -> str:
    """The case called `name`, or the first one that begins so."""
    return name if name in CASES else next(case for case in CASES if case.startswith(name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    loaded = {}

    def get(name: str):
        if name not in loaded:
            case = family_case(name)
            out = tmp_path_factory.mktemp(case)
            write_model_dir(CASES[case], out)
            loaded[name] = load_backbone(out, "float32")
        return loaded[name]

    return get


def random_adapter(model: ModelConfig, seed: int = 0, **settings) -> AdaFuse:
    """An adapter with B ≠ 0 and a router that is not balanced."""
    config = AdapterConfig(**({"num_experts": 4, "rank": 3, "top_k": 2, "alpha": 6.0} | settings))
    adapter = AdaFuse(config, model, rngs=nnx.Rngs(seed))
    key = jax.random.key(seed + 100)
    for name in config.targets:
        key, draw = jax.random.split(key)
        b = adapter.experts[name].B
        b[...] = 0.1 * jax.random.normal(draw, b.shape)
    adapter.router.weight[...] = adapter.router.weight[...] * 5
    return adapter


def tokens_of(model, shape=(2, 12), seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, model.config.vocab_size)


SMALL = {
    "lora": {"rank": 3, "alpha": 6.0},
    "moral": {"num_experts": 4, "rank": 3, "alpha": 6.0},
    "mola": {"experts_per_layer": (2, 4, 5), "rank": 3, "alpha": 6.0},
    "pesc": {"num_experts": 4, "rank": 3, "alpha": 1.5},
}
METHODS = tuple(SMALL)
FEW = {method: {"targets": ("q_proj", "down_proj")} if method != "pesc" else {} for method in METHODS}
"""Fewer linears, where the rest would only take longer to compile."""


def random_method(method: str, model, seed: int = 0, **settings):
    """An adapter with B ≠ 0 and routers that are not balanced."""
    config = AdapterConfig(adapter=method, **(SMALL[method] | settings))
    adapter = make_adapter(config, model, rngs=nnx.Rngs(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 100), 100))

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if "router" in name:
            return leaf * 5
        is_expert = jnp.abs(adapter_a(adapter, path)).sum((-1, -2), keepdims=True) > 0  # a layer of MoLA lacks some
        return leaf if ".A" in name else 0.1 * jax.random.normal(next(keys), leaf.shape) * is_expert

    return jax.tree_util.tree_map_with_path(fill, adapter)


def adapter_a(adapter, path) -> jax.Array:
    """The A beside the leaf at `path`."""
    leaves = jax.tree_util.tree_leaves_with_path(adapter)
    name = jax.tree_util.keystr(path).replace(".B", ".A")
    return next(leaf for p, leaf in leaves if jax.tree_util.keystr(p) == name)
