"""Meshes for training and for tensor parallelism, and placement of modules and decoding states over them by the rules of
`axes`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import fields

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.models.config import ModelConfig, RopeConfig, unsupported_field
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.quantised import LAYOUTS
from adafuse_jax.parallel.axes import CACHE, DATA, FSDP, MESH_AXES, TENSOR, logical_axes, partition_spec
from pallas_kernels.quantised import QuantLayout

log = logging.getLogger(__name__)

CONSUMED_FIELDS = frozenset({
    "vocab_size", "embed_dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",  # sizes of the axes
    "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "qk_norm_full", "norm_placement",
    "parallel_block",  # which arrays there are
})  # fmt: skip
"""Fields of `ModelConfig` that decide the arrays and how they are sharded; a model with any other is refused."""
IRRELEVANT_FIELDS = {
    "model_type": "families differ in the other fields",
    "norm_eps": "norms are over axes that are whole, those of activations and head_dim",
    "sliding_windows": "masks are over positions, which are whole",
    "norm": "norms are over axes that are whole", "local_rope": "as rope", "nope_layers": "as rope",
    **dict.fromkeys(
        (
            "activation", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logit_multiplier",
            "attention_softcap", "logit_softcap",
        ),
        "it acts on each element on its own",
    ),
    **dict.fromkeys(
        (f"rope.{field.name}" for field in fields(RopeConfig)), "angles are of positions and head_dim, which are whole"
    ),
    "max_position_embeddings": "the engine bounds the cache",
    "bos_token_id": "of prompts", "eos_token_ids": "the engine stops", "pad_token_id": "of batches",
}  # fmt: skip
"""Field → the reason why it cannot matter to sharding."""


def make_mesh(num_devices: int, model: ModelConfig, layout: QuantLayout | None = None) -> Mesh:
    """The first `num_devices` devices, for tensor parallelism. `layout`: of quantised linears.

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
    sizes = {TENSOR: num_devices}
    if reason := _uneven_share(model, sizes, layout=layout):
        other = _other_layouts(model, sizes, layout=layout)
        raise UserError(f"--tensor-parallel {num_devices}: {reason}; give a number that divides it{other}")
    return Mesh(devices[:num_devices], (TENSOR,))


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,fsdp=-1` → sizes by axis in the order of `MESH_AXES`, 1 where none is given. Raises `UserError`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES or name in sizes:
            fault = f"names {name} twice" if name in sizes else f"has {quoted(part)}"
            raise UserError(f"--mesh {quoted(text)}: {fault}; give sizes of {', '.join(MESH_AXES)}, as data=2,fsdp=-1")
        if not re.fullmatch(r"-1|[1-9][0-9]{0,5}", size):
            raise UserError(
                f"--mesh {quoted(text)}: {name} is {quoted(size)}; give a number of devices, or -1 for the rest"
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"--mesh {quoted(text)}: -1 stands twice; give one of the two as a number")
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def training_mesh(
    text: str | None,
    model: ModelConfig,
    batch_size: int,
    layout: QuantLayout | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh | None:
    """The mesh of `--mesh`; by default all devices as fsdp if they can share batch and model evenly, else one. None for one
    device. A log line says which. `layout`: of quantised linears. `devices`: others than this process sees.

    Raises:
      UserError: a size that does not fit the devices, the processes, the batch or the model.
    """
    devices = devices or jax.devices()
    sizes = {DATA: 1, FSDP: len(devices), TENSOR: 1}
    if text is not None:
        sizes = _filled_in(parse_mesh(text), len(devices), f"--mesh {text}")
    unknown = unsupported_field(model, CONSUMED_FIELDS | IRRELEVANT_FIELDS.keys())
    reason = unknown or _uneven_share(model, sizes, batch_size, layout)
    size = math.prod(sizes.values())
    if reason is None and jax.process_count() > 1 and size != len(devices):
        reason = f"{jax.process_count()} processes have {len(devices)} devices, and the mesh takes {size}"
    if reason is not None and (text is not None or jax.process_count() > 1):
        other = _other_layouts(model, sizes, batch_size, layout)
        advice = "train on one device" if unknown else f"give another mesh, or another --batch-size{other}"
        raise UserError(f"--mesh {text or _written(sizes)}: {reason}; {advice}")
    if reason is not None:
        log.info("training on one of %d devices: %s; --mesh or another --batch-size uses more", len(devices), reason)
        return None
    if size == 1:
        if len(devices) > 1:
            log.info("training on one of %d devices, --mesh %s", len(devices), text)
        return None
    of_processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    log.info("training on %d devices%s, --mesh %s", size, of_processes, _written(sizes))
    return Mesh(np.array(devices[:size]).reshape([*sizes.values()]), MESH_AXES)


def _filled_in(sizes: dict[str, int], num_devices: int, where: str) -> dict[str, int]:
    """The sizes with the devices that the others leave in the place of -1."""
    given = math.prod(size for size in sizes.values() if size > 0)
    if given > num_devices or (-1 in sizes.values() and num_devices % given):
        fault = "do not divide" if given <= num_devices else "are more than"
        raise UserError(f"{where}: {given} devices {fault} the {num_devices} that there are; give other sizes")
    return {axis: num_devices // given if size < 0 else size for axis, size in sizes.items()}


def _written(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _uneven_share(
    model: ModelConfig, sizes: dict[str, int], batch_size: int | None = None, layout: QuantLayout | None = None
) -> str | None:
    """The reason why a mesh of these sizes cannot share the model, or the rows of a batch; None if it can."""
    tensor, fsdp = sizes[TENSOR], sizes.get(FSDP, 1)
    rows = sizes.get(DATA, 1) * fsdp
    if batch_size is not None and batch_size % rows:
        return f"{rows} devices cannot share --batch-size {batch_size} evenly"
    for what, size, devices in (
        ("key-value heads", model.num_kv_heads, tensor),
        ("tokens", model.vocab_size, tensor),
        ("hidden units of the FFN", model.hidden_dim, tensor * fsdp),
        ("components of its embedding", model.embed_dim, fsdp),
        ("components of its keys", model.num_kv_heads * model.head_dim, tensor * fsdp),
        ("components of its queries", model.num_heads * model.head_dim, tensor * fsdp),
    ):
        if size % devices:
            return f"{devices} devices cannot share the model's {size} {what} evenly"
    group = (layout.group_size if layout is not None else None) or 1
    for what, size, devices in (  # the inputs of o, of down, and of the others
        ("queries", model.num_heads * model.head_dim, tensor),
        ("hidden units of the FFN", model.hidden_dim, tensor),
        ("components of its embedding", model.embed_dim, fsdp),
    ):
        if size // group % devices:
            return f"{devices} devices cannot share the {size // group} groups of {group} of the model's {what} evenly"
    return None


def _other_layouts(
    model: ModelConfig, sizes: dict[str, int], batch_size: int | None = None, layout: QuantLayout | None = None
) -> str:
    """Advice for quantised weights whose groups devices cannot share: the layouts that they can."""
    names = [
        name
        for name, other in LAYOUTS.items()
        if layout is not None and _uneven_share(model, sizes, batch_size, other) is None
    ]
    return f", or quantise to {' or '.join(names)}" if names else ""


def shard[Module](module: Module, mesh: Mesh) -> Module:
    """Distribute a backbone or an adapter over the mesh."""

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, partition_spec(logical_axes(path), mesh.axis_names)))

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
