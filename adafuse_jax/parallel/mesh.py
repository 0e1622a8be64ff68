"""Meshes for tensor parallelism, and placement of modules and decoding states over them by the rules of `axes`."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import ModelConfig, unsupported_field
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.parallel.axes import CACHE, TENSOR, logical_axes, partition_spec

CONSUMED_FIELDS = frozenset({
    "vocab_size", "embed_dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",  # sizes of the axes
    "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm",  # which arrays there are
})  # fmt: skip
"""Fields of `ModelConfig` that decide the arrays and how they are sharded; a model with any other is refused."""
IRRELEVANT_FIELDS = {
    "model_type": "families differ in the other fields",
    "norm_eps": "norms are over axes that are whole, embed and head_dim",
    "sliding_windows": "masks are over positions, which are whole",
    **dict.fromkeys(
        (
            "rope.theta", "rope.kind", "rope.factor", "rope.low_freq_factor", "rope.high_freq_factor",
            "rope.original_max_position_embeddings",
        ),
        "angles are of positions and head_dim, which are whole",
    ),
    "max_position_embeddings": "the engine bounds the cache",
    "bos_token_id": "of prompts", "eos_token_ids": "the engine stops", "pad_token_id": "of batches",
}  # fmt: skip
"""Field → the reason why it cannot matter to sharding."""


def make_mesh(num_devices: int, model: ModelConfig) -> Mesh:
    """The first `num_devices` devices.

    Raises:
      UserError: there are fewer, they cannot share the model evenly, or it has a field that sharding does not know.
    """
    if reason := unsupported_field(model, CONSUMED_FIELDS | IRRELEVANT_FIELDS.keys()):
        raise UserError(f"--tensor-parallel: {reason}; leave it out")
    devices = jax.devices()
    if len(devices) < num_devices:
        raise UserError(
            f"--tensor-parallel {num_devices} needs as many devices, and there are {len(devices)}; give at most that"
        )
    for name, size in (
        ("key-value heads", model.num_kv_heads), ("hidden units of the FFN", model.hidden_dim), ("tokens", model.vocab_size)
    ):  # fmt: skip
        if size % num_devices:
            raise UserError(
                f"--tensor-parallel {num_devices} cannot share the model's {size} {name} evenly; give a number that "
                "divides it"
            )
    return Mesh(devices[:num_devices], (TENSOR,))


def shard[Module](module: Module, mesh: Mesh) -> Module:
    """Distribute a backbone or an adapter over the mesh."""

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, partition_spec(logical_axes(path))))

    return jax.tree_util.tree_map_with_path(place, module)


def mesh_of(module: object) -> Mesh | None:
    """The mesh that `shard` has put a module on; None if it has not."""
    placement = jax.tree.leaves(module)[0].sharding
    return placement.mesh if isinstance(placement, NamedSharding) and isinstance(placement.mesh, Mesh) else None


def place_state[State](state: State, mesh: Mesh) -> State:
    """Distribute a decoding state over the mesh: the cache by its heads, the rest whole."""

    def sharding(part: object) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(CACHE) if isinstance(part, KVCache) else PartitionSpec())

    return jax.tree.map(
        lambda part: jax.device_put(part, sharding(part)), state, is_leaf=lambda part: isinstance(part, KVCache)
    )
