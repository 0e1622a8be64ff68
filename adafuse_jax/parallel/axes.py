"""Logical axes: the name of every axis of every array, and the rules that map names to axes of a mesh.

    q, k, v, gate, up    W [layers, out, embed];    A [layers, experts, rank, embed];    B [layers, experts, out, rank]
    o, down              W [layers, embed, in];     A [layers, experts, rank, in];       B [layers, experts, embed, rank]
    out and in:          heads (q, o), kv_heads (k, v), hidden (gate, up, down)
    lm_head              [vocab, embed];            embed_tokens [input_vocab, embed]
    norms                [layers, embed]; of queries and keys [layers, head_dim]; the last one [embed]
    cache                [layers, batch, length, kv_heads, head_dim]

An axis that the rules do not name is replicated, as are routers and PESC's experts, which act on whole activations. With
`TENSOR_PARALLEL` a device holds whole heads, and computes the attention of its heads and its hidden units of the FFN; the
outputs of o and down are partial sums, so two all-reduces per layer are all that devices exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec
from jax.tree_util import keystr

Axes = tuple[str | None, ...]
Rules = Mapping[str, str]
"""Logical axis → axis of the mesh."""

TENSOR = "tensor"
TENSOR_PARALLEL: Rules = {"heads": TENSOR, "kv_heads": TENSOR, "hidden": TENSOR, "vocab": TENSOR}

LINEARS: Mapping[str, tuple[str, str]] = {
    "q_proj": ("heads", "embed"), "k_proj": ("kv_heads", "embed"), "v_proj": ("kv_heads", "embed"),
    "o_proj": ("embed", "heads"), "gate_proj": ("hidden", "embed"), "up_proj": ("hidden", "embed"),
    "down_proj": ("embed", "hidden"),
}  # fmt: skip
"""(out, in) of the seven linears."""
TABLES: dict[str, Axes] = {"embed_tokens": ("input_vocab", "embed"), "lm_head": ("vocab", "embed")}
NORMS: dict[str, Axes] = {
    "input_layernorm": ("layers", "embed"), "post_attention_layernorm": ("layers", "embed"), "norm": ("embed",),
    "q_norm": ("layers", "head_dim"), "k_norm": ("layers", "head_dim"),
}  # fmt: skip
CACHE: Axes = ("layers", "batch", "length", "kv_heads", "head_dim")


def logical_axes(path: tuple[Any, ...]) -> Axes:
    """Logical axes of a leaf of a backbone or of an adapter, by its path in the pytree; () for
    routers and the experts of PESC, which are of no linear.

    Raises:
      ValueError: no table here has it.
    """
    names = [name for name in keystr(path, simple=True, separator="/").split("/") if name not in ("value", "raw_value")]
    if "router" in names:
        return ()
    for name in names:
        if name in LINEARS:
            return linear_axes(name, names[-1])
        if name in TABLES or name in NORMS:
            return (TABLES | NORMS)[name]
    if names[:2] == ["experts", "lora"]:
        return ()
    raise ValueError(f"{'/'.join(names)} has no logical axes; add them to parallel/axes.py")


def linear_axes(linear: str, leaf: str) -> Axes:
    """Logical axes of a linear's stacked `weight` or `bias`, or of the factors `A` and `B` of its experts."""
    out, into = LINEARS[linear]
    return {
        "weight": ("layers", out, into),
        "bias": ("layers", out),
        "A": ("layers", "experts", "rank", into),
        "B": ("layers", "experts", out, "rank"),
    }[leaf]


def partition_spec(axes: Axes, rules: Rules = TENSOR_PARALLEL) -> PartitionSpec:
    """Partition spec of an array with these axes, without a tail of axes that are whole."""
    spec = [None if axis is None else rules.get(axis) for axis in axes]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)
