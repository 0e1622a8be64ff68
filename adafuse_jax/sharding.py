"""Tensor parallelism: which axis of which array is cut over the devices of a mesh; XLA adds the sums between them.

    q, k, v, gate, up    W [L, out, in] by out;   A [L, E, R, in] whole;   B [L, E, out, R] by out
    o, down              W by in;                 A by in;                 B whole
    head [V, D] by V;    cache [L, B, S, K, H] by K;    everything else whole

A device holds whole heads, and computes attention and the FFN's hidden units of its own; o and down add up what the devices
found, so that two sums per layer are all they exchange.
"""

from __future__ import annotations

import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adafuse_jax.configs import ModelConfig
from adafuse_jax.core.errors import UserError
from adafuse_jax.model.cache import KVCache

AXIS = "model"
BY_OUT, BY_IN = r"(q|k|v|gate|up)_proj", r"(o|down)_proj"
TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (rf"layers.*{BY_OUT}.*weight", PartitionSpec(None, AXIS)),
    (rf"layers.*{BY_OUT}.*bias", PartitionSpec(None, AXIS)),
    (rf"layers.*{BY_IN}.*weight", PartitionSpec(None, None, AXIS)),
    (rf"experts.*{BY_OUT}.*\bB\b", PartitionSpec(None, None, AXIS)),
    (rf"experts.*{BY_IN}.*\bA\b", PartitionSpec(None, None, None, AXIS)),
    (r"lm_head", PartitionSpec(AXIS)),
)
"""Name of a leaf of the backbone or of an adapter → how it is cut; the first that is found counts."""
CACHE = PartitionSpec(None, None, None, AXIS)


def cut_of(name: str) -> PartitionSpec:
    """Of a leaf, by its path in a backbone or an adapter."""
    return next((spec for pattern, spec in TABLE if re.search(pattern, name)), PartitionSpec())


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
    return Mesh(devices[:num_devices], (AXIS,))


def shard[Module](module: Module, mesh: Mesh) -> Module:
    """A backbone or an adapter over the mesh, cut as `TABLE` says."""

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, cut_of(jax.tree_util.keystr(path))))

    return jax.tree_util.tree_map_with_path(place, module)


def mesh_of(module: object) -> Mesh | None:
    """Where `shard` has put a module; None if it has not."""
    placement = jax.tree.leaves(module)[0].sharding
    return placement.mesh if isinstance(placement, NamedSharding) and isinstance(placement.mesh, Mesh) else None


def place_state[State](state: State, mesh: Mesh) -> State:
    """A decoding state over the mesh: the cache by its heads, the rest whole."""

    def shardings(part: object) -> NamedSharding:
        return NamedSharding(mesh, CACHE if isinstance(part, KVCache) else PartitionSpec())

    return jax.tree.map(
        lambda part: jax.device_put(part, shardings(part)), state, is_leaf=lambda part: isinstance(part, KVCache)
    )
