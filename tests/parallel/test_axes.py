"""Logical axes of every leaf, and the sharding that a mesh makes of them, against tables written by hand."""

from __future__ import annotations

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from random_models import FEW

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import MODULES, make_adapter
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.parallel.axes import MESH_AXES, RULES, logical_axes, partition_spec

MODEL = ModelConfig(
    model_type="qwen3", vocab_size=260, embed_dim=32, hidden_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=64, norm_eps=1e-5, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
SIZES = {
    "layers": 2, "embed": 32, "hidden": 48, "heads": 64, "kv_heads": 32, "vocab": 260, "input_vocab": 260,
}  # fmt: skip
BY_OUT, BY_IN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
SHARDED = {
    **{(linear, leaf): P(None, "tensor") for linear in BY_OUT for leaf in ("weight", "bias")},
    **{(linear, "B"): P(None, None, "tensor") for linear in BY_OUT},
    **{(linear, "weight"): P(None, None, "tensor") for linear in BY_IN},
    **{(linear, "A"): P(None, None, None, "tensor") for linear in BY_IN},
}
"""(linear, leaf) → how tensor parallelism shards it; what is not here is whole, but for the head."""
BOTH = ("tensor", "fsdp")
ON_A_MESH = {
    **{(linear, "weight"): P(None, "tensor", "fsdp") for linear in BY_OUT},
    **{(linear, "bias"): P(None, BOTH) for linear in BY_OUT},
    **{(linear, "A"): P(None, None, None, "fsdp") for linear in BY_OUT},
    **{(linear, "B"): P(None, None, BOTH) for linear in BY_OUT},
    **{(linear, "weight"): P(None, "fsdp", "tensor") for linear in BY_IN},
    **{(linear, "bias"): P(None, "fsdp") for linear in BY_IN},
    **{(linear, "A"): P(None, None, None, BOTH) for linear in BY_IN},
    **{(linear, "B"): P(None, None, "fsdp") for linear in BY_IN},
    ("lm_head", "lm_head"): P("tensor", "fsdp"), ("embed_tokens", "embed_tokens"): P(None, "fsdp"),
    ("experts", "A"): P(None, None, None, "fsdp"), ("experts", "B"): P(None, None, "fsdp"),
}  # fmt: skip
"""(linear or table, leaf) → how a mesh of all three axes shards it; ("experts", …) are PESC's."""


def leaves(module: object) -> list[tuple[tuple, str, jax.ShapeDtypeStruct]]:
    found = jax.tree_util.tree_leaves_with_path(module)
    return [(path, jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in found]


def modules() -> dict[str, object]:
    make = {"backbone": lambda: Backbone(MODEL, dtype="float32", rngs=nnx.Rngs(0))}
    for method in MODULES:
        config = AdapterConfig(
            adapter=method, **FEW.get(method, {}) | ({"experts_per_layer": (2, 4)} if method == "mola" else {})
        )
        make[method] = lambda config=config: make_adapter(config, MODEL, rngs=nnx.Rngs(0))
    return {name: jax.eval_shape(build) for name, build in make.items()}


@pytest.mark.parametrize(("name", "module"), modules().items())
def test_every_leaf_is_sharded_as_the_table_says(name, module):
    for path, text, leaf in leaves(module):
        names = text.split("/")
        linear = next((n for n in names if n.endswith("_proj")), None)
        kind = next(n for n in reversed(names) if n not in ("value", "raw_value"))
        wanted = P() if "router" in names or linear is None else SHARDED.get((linear, kind), P())
        assert partition_spec(logical_axes(path)) == (P("tensor") if "lm_head" in names else wanted), text
        axes = logical_axes(path)
        assert len(axes) in (0, leaf.ndim), text
        for axis, size in zip(axes, leaf.shape, strict=False):
            assert size == SIZES.get(axis, size), (text, axis)


@pytest.mark.parametrize(("name", "module"), modules().items())
def test_every_leaf_is_sharded_over_a_mesh_as_the_table_says(name, module):
    for path, text, _ in leaves(module):
        names = [n for n in text.split("/") if n not in ("value", "raw_value")]
        owner = next((n for n in names if n.endswith("_proj") or n in ("lm_head", "embed_tokens")), "experts")
        wanted = P() if "router" in names else ON_A_MESH.get((owner, names[-1]), P())
        assert partition_spec(logical_axes(path), MESH_AXES) == wanted, text


def test_an_axis_of_the_mesh_serves_once():
    axes = ("layers", "hidden", "embed")
    assert partition_spec(axes, ("fsdp", "tensor")) == P(None, "tensor", "fsdp")
    assert partition_spec(axes, ("fsdp",)) == P(None, None, "fsdp")
    assert partition_spec(axes, ()) == P()
    assert partition_spec(("batch", None, "heads"), MESH_AXES) == P(("data", "fsdp"), None, "tensor")
    assert {axis for axis, name in RULES if name == "tensor"} == {"heads", "kv_heads", "hidden", "vocab"}
