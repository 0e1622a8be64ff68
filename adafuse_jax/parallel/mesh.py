"""Meshes for tensor parallelism, and putting modules and decoding states on them as the rules of `axes` say."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.parallel.axes import CACHE, TENSOR, logical_axes, partition_spec


def make_mesh(num_devices: int, model: ModelConfig) -> Mesh:
    """The first `num_devices` devices. Raises `UserError` if there are fewer, or if they cannot share the model evenly."""
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
    """A backbone or an adapter over the mesh."""

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, partition_spec(logical_axes(path))))

    return jax.tree_util.tree_map_with_path(place, module)


def mesh_of(module: object) -> Mesh | None:
    """The mesh that `shard` has put a module on; None if it has not."""
    placement = jax.tree.leaves(module)[0].sharding
    return placement.mesh if isinstance(placement, NamedSharding) and isinstance(placement.mesh, Mesh) else None


def place_state[State](state: State, mesh: Mesh) -> State:
    """A decoding state over the mesh: the cache by its heads, the rest whole."""

    def sharding(part: object) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(CACHE) if isinstance(part, KVCache) else PartitionSpec())

    return jax.tree.map(
        lambda part: jax.device_put(part, sharding(part)), state, is_leaf=lambda part: isinstance(part, KVCache)
    )
