"""Logical axes: the name of every axis of every array, and the rules that map names to axes of a mesh.

    q, k, v, gate, up    W [layers, out, embed];    A [layers, experts, rank, embed];    B [layers, experts, out, rank]
    o, down              W [layers, embed, in];     A [layers, experts, rank, in];       B [layers, experts, embed, rank]
    out and in:          heads (q, o), kv_heads (k, v), hidden (gate, up, down)
    lm_head              [vocab, embed];            embed_tokens [input_vocab, embed]
    norms                [layers, norm]; of queries and keys [layers, head_dim]; the last one [norm]
    PESC                 A [layers, experts, rank, embed];  B [layers, experts, embed, rank]
    cache                [layers, batch, length, kv_heads, head_dim]

An axis that the rules do not name is replicated, as are routers and norms. A mesh has some of three axes:

    data      rows of a batch; weights are whole
    fsdp      rows of a batch, too; of every weight, and of what trains and its moments, each device keeps a part, and has
              one layer's weights whole at a time
    tensor    whole heads and hidden units of the FFN; outputs of o and down are partial sums, so two all-reduces per layer
              are all that devices exchange
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jax.sharding import PartitionSpec
from jax.tree_util import keystr

from adafuse_jax.models.config import BLOCK_NORMS

Axes = tuple[str | None, ...]

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
MESH_AXES = (DATA, FSDP, TENSOR)
RULES: tuple[tuple[str, str], ...] = (
    ("batch", DATA), ("batch", FSDP),
    ("embed", FSDP), ("heads", TENSOR), ("kv_heads", TENSOR), ("hidden", TENSOR), ("vocab", TENSOR),
    ("heads", FSDP), ("kv_heads", FSDP), ("hidden", FSDP),
)  # fmt: skip
"""(logical axis, axis of the mesh). In an array an axis of the mesh serves once, by the first rule that takes it: `heads`
takes `fsdp` in B [layers, experts, heads, rank], and not in W [layers, heads, embed]."""

LINEARS: dict[str, tuple[str, str]] = {
    "q_proj": ("heads", "embed"), "k_proj": ("kv_heads", "embed"), "v_proj": ("kv_heads", "embed"),
    "o_proj": ("embed", "heads"), "gate_proj": ("hidden", "embed"), "up_proj": ("hidden", "embed"),
    "down_proj": ("embed", "hidden"),
}  # fmt: skip
"""(out, in) of the seven linears."""
TABLES: dict[str, Axes] = {"embed_tokens": ("input_vocab", "embed"), "lm_head": ("vocab", "embed")}
NORMS: dict[str, Axes] = {
    **dict.fromkeys(BLOCK_NORMS, ("layers", "norm")), "norm": ("norm",),
    "q_norm": ("layers", "head_dim"), "k_norm": ("layers", "head_dim"),
}  # fmt: skip
CACHE: Axes = ("layers", "batch", "length", "kv_heads", "head_dim")


def logical_axes(path: tuple[Any, ...]) -> Axes:
    """Logical axes of a leaf of a backbone or of an adapter, by its path in the pytree, which may have other names in front;
    () for routers.

    Raises:
      ValueError: no table here has it.
    """
    names = [name for name in keystr(path, simple=True, separator="/").split("/") if name not in ("value", "raw_value")]
    if "router" in names:
        return ()
    for name in names:
        if name in LINEARS:
            return linear_axes(name, names[-1])
        if name in TABLES and names[-1] == "channel_scales":
            return TABLES[name][:1]
        if name in TABLES or name in NORMS:
            return (TABLES | NORMS)[name]
    if "lora" in names:  # PESC's, of no linear
        return _factor_axes("embed", "embed")[names[-1]]
    raise ValueError(f"{'/'.join(names)} has no logical axes; add them to parallel/axes.py")


def linear_axes(linear: str, leaf: str) -> Axes:
    """Logical axes of a linear's stacked `weight` or `bias`, of a quantised weight's codes and scales, or of the factors `A`
    and `B` of its experts."""
    out, into = LINEARS[linear]
    whole, rows = ("layers", out, into), ("layers", out)
    leaves: dict[str, Axes] = {
        "weight": whole,
        "codes": whole,
        "group_scales": whole,
        "channel_scales": rows,
        "bias": rows,
    }
    return (leaves | _factor_axes(out, into))[leaf]


def _factor_axes(out: str, into: str) -> dict[str, Axes]:
    return {"A": ("layers", "experts", "rank", into), "B": ("layers", "experts", out, "rank")}


def partition_spec(axes: Axes, mesh_axes: Collection[str] = (TENSOR,)) -> PartitionSpec:
    """Partition spec of an array with these axes over a mesh that has `mesh_axes`, without a tail of axes that are whole."""
    found: list[list[str]] = [[] for _ in axes]
    used: set[str] = set()
    for logical, mesh_axis in RULES:
        if logical in axes and mesh_axis in mesh_axes and mesh_axis not in used:
            found[axes.index(logical)].append(mesh_axis)
            used.add(mesh_axis)
    spec = [tuple(names) if len(names) > 1 else names[0] if names else None for names in found]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)
