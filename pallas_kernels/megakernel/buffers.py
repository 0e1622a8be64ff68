"""Every buffer in device memory that the kernel reads or writes: one table, and the refs of a launch by its names.

`TABLE` is what README.md shows (`python -m pallas_kernels.megakernel.buffers` prints it). Letters: B rows of the batch,
N the padded batch, L layers, D embed, F hidden, H head_dim, K key-value heads, V vocabulary, E experts, R rank, U
experts in use, S cache slots, G attention units of a row and split, P partial sums (split_k and, of adapted linears,
one of B), M tiles of 128 rows of a group, T rank tiles in use. Of quantised linears `weights` are codes, [L, out, bytes].
"K-tiles of D" is an activation [D / 64 · N + 64, 64]:
K-tile 0 of all rows, then K-tile 1 …, so that a slice of it is contiguous. A partial sum of a tile is [halves, N / 8,
64, 8]; of a batch of one, eight partial sums are the columns of one such tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from pallas_kernels.megakernel.plan import ALL_REDUCED, Group, Plan
from pallas_kernels.megakernel.sizes import TILE_K, WGMMA_M, WGMMA_N, stored_head_dim

Shapes = dict[str, tuple[tuple[int, ...], Any]]
"""Name → (shape, dtype)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One buffer, as the table shows it."""

    name: str
    shape: str
    dtype: str
    writer: str
    readers: str


TABLE = (
    Row("x", "K-tiles of D", "bf16", "caller; o, down", "o, down"),
    Row("x_weighted", "K-tiles of D", "bf16", "caller; o, down", "qkv, gate_up, head"),
    Row("square_sums", "[D / 64, N]", "fp32", "caller; o, down", "qkv, gate_up, head"),
    Row("norms", "[2 L + 1, D]", "bf16, fp32", "caller", "o, down"),
    Row("output_norms", "[2 L, D]", "bf16, fp32", "caller, or absent", "o, down"),
    Row("output", "K-tiles of D", "bf16", "o, down, with output norms", "o, down"),
    Row("output_square_sums", "[D / 64, N]", "fp32", "o, down, with output norms", "o, down"),
    Row("positions", "[B]", "int32", "caller", "attention"),
    Row("windows", "[L]", "int32", "caller", "attention"),
    Row("ropes", "[L]", "int32", "caller, or absent", "attention"),
    Row("cos", "[ropes · N, H]", "fp32", "caller", "attention"),
    Row("sin", "[ropes · N, H], the first half negated", "fp32", "caller", "attention"),
    Row("cache_k", "[L, B, S, K, H]", "bf16", "caller", "attention"),
    Row("cache_v", "[L, B, S, K, H]", "bf16", "caller", "attention"),
    Row("q_norm", "[L, H]", "bf16, fp32", "caller, or absent", "attention"),
    Row("k_norm", "[L, H]", "bf16, fp32", "caller, or absent", "attention"),
    Row("weights", "by linear [L, out, in]; lm_head [V, D]", "bf16; of layers perhaps uint8", "caller", "every group"),
    Row("scales", "by linear [L, groups, out]", "bf16, fp16, fp32", "caller, or absent", "every group: W x"),
    Row("biases", "by linear [L, out]", "bf16", "caller", "every group"),
    Row("a", "by adapted linear [L, E, R, in]", "bf16", "caller", "its group"),
    Row("b", "by adapted linear [L, E, out, R]", "bf16", "caller", "its group"),
    Row("experts", "[U], those in use first", "int32", "caller", "every group"),
    Row("num_used", "[1]", "int32", "caller", "every group"),
    Row("gates", "[U, N], with the scale α/R", "fp32", "caller", "every group"),
    Row("y_partials", "[P, M, 2, N / 8, 64, 8]", "fp32", "every group: W x and B h", "the same group: epilogue"),
    Row(
        "device_partials", "[2, devices, P, M, 2, N / 8, 64, 8]", "fp32", "o, down of all devices", "o, down: epilogue"
    ),
    Row("t_partials", "[1 or 2, P, targets, T, N / 8, 64, 8]", "fp32", "every group: A x", "the same group: h"),
    Row("h", "K-tiles of targets · U · R", "bf16", "every group: h (N > 1 row)", "the same group: B h"),
    Row("inverse_rms", "[CTAs, N]", "fp32", "qkv, gate_up, head", "the same CTA"),
    Row("q_raw", "[heads + 8, N, H]", "bf16", "qkv", "attention"),
    Row("k_raw", "[K, N, H]", "bf16", "qkv", "attention"),
    Row("context", "K-tiles of heads · H", "bf16", "attention", "o"),
    Row("hidden", "K-tiles of F", "bf16", "gate_up", "down"),
    Row("o_partials", "[splits, N, G, H / 64, 64, 8]", "fp32", "attention, split contexts", "combine"),
    Row("max_partials", "[splits, N, G, 8]", "fp32", "attention, split contexts", "combine"),
    Row("sum_partials", "[splits, N, G, 8]", "fp32", "attention, split contexts", "combine"),
    Row("logits", "[V, N]", "fp32", "head", "caller"),
    Row("k_new", "[L, N, K, H]", "bf16", "attention", "caller"),
    Row("v_new", "[L, N, K, H]", "bf16", "qkv", "attention, caller"),
)


@dataclass(slots=True, kw_only=True)
class Buffers:
    """The refs of a launch, by the names of `TABLE`; those that it has no use for are None or empty."""

    x: Any = None
    x_weighted: Any = None
    square_sums: Any = None
    norms: Any = None
    output_norms: Any = None
    output: Any = None
    output_square_sums: Any = None
    positions: Any = None
    windows: Any = None
    ropes: Any = None
    cos: Any = None
    sin: Any = None
    cache_k: Any = None
    cache_v: Any = None
    q_norm: Any = None
    k_norm: Any = None
    weights: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, Any] = field(default_factory=dict)
    biases: dict[str, Any] = field(default_factory=dict)
    a: dict[str, Any] = field(default_factory=dict)
    b: dict[str, Any] = field(default_factory=dict)
    experts: Any = None
    num_used: Any = None
    gates: Any = None
    y_partials: Any = None
    device_partials: Any = None
    t_partials: Any = None
    h: Any = None
    inverse_rms: Any = None
    q_raw: Any = None
    k_raw: Any = None
    context: Any = None
    hidden: Any = None
    o_partials: Any = None
    max_partials: Any = None
    sum_partials: Any = None
    logits: Any = None
    k_new: Any = None
    v_new: Any = None

    @classmethod
    def of(cls, names: Sequence[tuple[str, ...]], refs: Sequence[Any]) -> Buffers:
        """("x",) names `buffers.x`, ("a", "q_proj") names `buffers.a["q_proj"]`."""
        buffers = cls()
        for (name, *linear), ref in zip(names, refs, strict=True):
            if linear:
                getattr(buffers, name)[linear[0]] = ref
            else:
                setattr(buffers, name, ref)
        return buffers


def partial_sums(groups: Sequence[Group], plan: Any, dtype: Any) -> Shapes:
    """The buffers through which the CTAs of a group exchange partial sums: `y_partials`, and with experts `t_partials`
    and, unless the batch is one row, `h`. `plan`: a `Plan`, or what has its fields of the batch and of the ranks."""
    split_k, targets = max(group.split_k for group in groups), max(len(group.adapted) for group in groups)

    def shape(partials, *what):
        if plan.is_batch_one:
            return (-(-partials // WGMMA_N), *what, 1, WGMMA_M, WGMMA_N), jnp.float32
        return (partials, *what, plan.padded_batch // WGMMA_N, WGMMA_M, WGMMA_N), jnp.float32

    buffers = {"y_partials": shape(split_k + bool(targets), max(group.num_tiles for group in groups), 2)}
    if targets:
        partials = max(group.a_partials for group in groups)
        tiles, kind = shape(partials, targets, plan.max_rank_tiles + plan.max_rank_tiles % 2)
        buffers["t_partials"] = (plan.t_buffers, *tiles), kind
    if targets and not plan.is_batch_one:
        rank_tiles = targets * plan.max_rank_tiles + -plan.max_rank_tiles % plan.h_rank_tiles  # the last piece is whole
        buffers["h"] = ((rank_tiles * plan.padded_batch + WGMMA_M, TILE_K), dtype)
    return buffers


def scratch_and_outputs(plan: Plan, model: Any, dtype: Any, devices: int | None) -> Shapes:
    """All buffers that the launch itself fills. `model`: an `op.Shape`. `devices`: that share the model, or None for
    one."""
    n = plan.padded_batch
    new = (model.num_layers, n, model.num_kv_heads, model.head_dim)
    units = (plan.context_splits, n, model.num_kv_heads * -(-model.num_heads // model.num_kv_heads // WGMMA_N))
    buffers: Shapes = {
        **partial_sums(plan.groups, plan, dtype),
        "inverse_rms": ((plan.num_ctas, n), jnp.float32),
        "q_raw": ((model.num_heads + WGMMA_N, n, stored_head_dim(model.head_dim)), dtype),
        "k_raw": ((model.num_kv_heads, n, stored_head_dim(model.head_dim)), dtype),
        "context": ((model.num_heads * model.head_dim // TILE_K * n + WGMMA_M, TILE_K), dtype),
        "hidden": ((model.hidden_dim // TILE_K * n + WGMMA_M, TILE_K), dtype),
        "logits": (((devices or 1) * model.head_rows, n), jnp.float32),
        "k_new": (new, dtype),
        "v_new": (new, dtype),
    }
    if model.has_output_norms:
        buffers["output"] = (model.embed_dim // TILE_K * n, TILE_K), dtype
        buffers["output_square_sums"] = (-(-model.embed_dim // WGMMA_M**2) * WGMMA_M, n), jnp.float32
    if plan.context_splits > 1:
        buffers["o_partials"] = ((*units, model.head_dim // TILE_K, WGMMA_M, WGMMA_N), jnp.float32)
        buffers |= dict.fromkeys(("max_partials", "sum_partials"), ((*units, WGMMA_N), jnp.float32))
    if devices is not None:
        reduced = [group for group in plan.groups if group.all_reduced]
        shape, kind = partial_sums(reduced, plan, dtype)["y_partials"]
        buffers["device_partials"] = (len(ALL_REDUCED), devices, *shape), kind
    return buffers


def markdown() -> str:
    """`TABLE` for README.md."""
    rows = [(f"`{r.name}`", r.shape, r.dtype, r.writer, r.readers) for r in TABLE]
    lines = [("name", "shape", "dtype", "writer", "readers"), ("---",) * 5, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown())
