"""Linears that share an input, with pre-gated low-rank experts, unmerged, in one launch on NVIDIA GPUs since Ampere:

    y[b] = W[l] h[b] + Σ_u g[u, b] · B[l, e_u] (out×R) · (A[l, e_u] (R×in) · h[b])        for every linear that reads h

The experts are known before layer 0 (arXiv 2603.11873, Eq. 2), so their factors are read beside the backbone's weights, in
the same launch. Ids, gates and the layer are device arrays; no value of them is read on the host. A norm in front, biases, a
residual and activation(gate) · up are in the launch too. `reference.pregated_linear_xla` is the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.megakernel.mixture import Mixture
from pallas_kernels.pregated_linear import triton_call
from pallas_kernels.pregated_linear.kernel_experts import shrink, shrink_part
from pallas_kernels.pregated_linear.kernel_quantised import for_kernel, in_halves
from pallas_kernels.pregated_linear.kernel_triton import Group, Launch, Tiles, linear
from pallas_kernels.quantised import QuantArray, QuantLayout

MAX_BATCH = 32
MAX_RANK = 256
GROUP_SIZES = (32, 64, 128)
LARGE = 4096
"""Rows, or columns, of a large linear; with 64 rows a program, 2 · LARGE rows are a program for every multiprocessor."""


def tiles_for(
    batch: int,
    outs: Sequence[int],
    in_dim: int,
    itemsize: int,
    gated: bool = False,
    layout: QuantLayout | None = None,
) -> Tiles:
    """Rows few enough that a small linear fills the GPU, columns enough that loads are long.

    A program reads as much of x as if it had `batch` more rows of W. So programs of several rows have more rows of large
    linears, and share columns where they would be too few; XLA adds the sums of one linear beside the norm that follows.
    With one row, the programs that compute t are done earlier if they have few rows of A and many of its columns. Inputs
    wider than 2 · LARGE leave them the time, and there fewer of them were faster.

    Args:
      outs: rows of W of each linear. `gated`: they are a gated pair.
      layout: of quantised weights, of which several rows take a group at a time, if there are groups.
    """
    out_dim = outs[0] if gated else sum(outs)
    is_large = itemsize == 2 and layout is None and in_dim >= LARGE
    if batch == 1:
        tile_k = min(1024 // itemsize, pl.next_power_of_2(in_dim))
        tiles = Tiles(tile_m=4 if gated else 8, tile_k=tile_k, num_warps=4, num_stages=1)
        if tile_k < in_dim <= 2 * LARGE:
            tiles = replace(tiles, shrink_m=tiles.tile_m // 2, shrink_k=2 * tile_k)
    elif itemsize == 4:  # products without tensor cores, which take more registers
        tiles = Tiles(tile_m=32, tile_k=32, num_warps=4, num_stages=3)
    elif is_large and out_dim >= 2 * LARGE:
        tiles = Tiles(tile_m=64, tile_k=64 if gated else 128, shrink_m=32, num_warps=4, num_stages=4)
    elif is_large and out_dim >= LARGE and len(outs) == 1:
        shrink_splits = 4 * pl.cdiv(in_dim, 2 * LARGE)
        tiles = Tiles(tile_m=64, tile_k=128, splits=2, shrink_splits=shrink_splits, num_warps=4, num_stages=4)
    else:
        tile_k = max(16, min(128, pl.next_power_of_2(in_dim)))
        tiles = Tiles(tile_m=32, tile_k=tile_k, num_warps=4, num_stages=4)
    if layout is None:
        return tiles
    size = layout.group_size or 1
    tile_q = min(1024, pl.next_power_of_2(in_dim // size) * size) if batch == 1 else layout.group_size or tiles.tile_k
    return replace(tiles, tile_q=tile_q)


def unsupported_reason(batch: int, a: dict[str, Array], weights: Mapping[str, Array | QuantArray]) -> str | None:
    """The reason why the kernel does not support so many rows, experts A [L, E, R, in] or weights, or None."""
    if batch > MAX_BATCH:
        return f"there are {batch} rows, and a program takes {MAX_BATCH}"
    for name, factor in a.items():
        if factor.shape[2] > MAX_RANK:
            return f"{name} has rank {factor.shape[2]}, and a program takes {MAX_RANK}"
    for name, weight in weights.items():
        if isinstance(weight, QuantArray) and 2**31 < weight.codes.size <= 2**32:
            # Pallas' Triton has places of 64 bits in arrays above 4 GiB, else of 32 bits, one of which is the sign.
            return f"{name} has {weight.codes.size:,} bytes of codes, and it takes no 2 to 4 GiB of bytes"
    return None


@partial(jax.jit, static_argnames=("group", "interpret"))
def pregated_linear(
    x: Float[Array, "B in"],
    weights: dict[str, Float[Array, "L out in"] | QuantArray],
    a: dict[str, Float[Array, "L E R in"]],
    b: dict[str, Float[Array, "L E out R"]],
    mixture: Mixture | None,
    num_used: Int[Array, 1],
    layer: Int[Array, 1],
    ready: Int[Array, " layers*counters"],
    *,
    group: Group,
    norm: Float[Array, "L in"] | None = None,
    biases: dict[str, Float[Array, "L out"]] | None = None,
    residual: Float[Array, "B out"] | None = None,
    interpret: bool = False,
) -> tuple[dict[str, Array], Array]:
    """(name → y [B, out], ready). The y of a gated pair has the gate's name.

    Args:
      x: bf16, fp16 or fp32, and so are the weights, unless all of them are quantised in one layout, and the factors. `a`,
        `b`: of the linears that have experts.
      mixture: the experts of the batch, those in use in front, and the gates of its rows; None if no linear has experts.
      num_used: how many of its experts are in use.
      ready: zeros at the beginning of every step, and made anew for it. A launch counts in the element `layer · counters +
        counter`, which no other launch of the step may have.
      norm: weight of an RMS norm of x, for one row.

    Raises `ValueError` for shapes or types that do not fit together, or that the kernel does not support.
    """
    _validate(x, weights, a, b, mixture, norm, group)
    batch, tile_m, splits = x.shape[0], group.tiles.tile_m, group.tiles.splits
    outs: dict[str, Any] = {"y": {}, "t": {}, "parts": {}, "ready": jax.ShapeDtypeStruct(ready.shape, ready.dtype)}
    programs: list[tuple[int, Callable]] = []
    refs: dict[str, Any] = {"ready": ready, "x": x, "layer": layer, "w": weights, "a": a, "b": b, "bias": biases or {}}
    refs |= {"norm": norm, "residual": residual}
    if splits > 1:  # XLA adds them
        refs |= {"bias": {}, "residual": None}
    first = next(iter(weights.values()))
    if isinstance(first, QuantArray):
        refs["w"] = {name: for_kernel(w) for name, w in weights.items() if isinstance(w, QuantArray)}
        refs |= {"x_halves": in_halves(x, first), "norm_halves": None if norm is None else in_halves(norm, first)}
    num_shrink, parts = 0, group.tiles.shrink_splits - 1
    if mixture is not None and a:
        refs |= {"experts": mixture.experts, "gates": mixture.gates, "num_used": num_used}
        max_used, shape = len(mixture.experts), (max(16, pl.next_power_of_2(batch)),)
        counts = {name: max_used * pl.cdiv(factor.shape[2], group.tiles.of_a[0]) for name, factor in a.items()}
        num_parts = parts * sum(counts.values())
        for name, factor in a.items():
            outs["t"][name] = jax.ShapeDtypeStruct((max_used, batch, factor.shape[2]), x.dtype)
            if parts:
                outs["parts"][name] = jax.ShapeDtypeStruct((parts, max_used, factor.shape[2], *shape), jnp.float32)
                programs.append((parts * counts[name], partial(shrink_part, name=name)))
        for name, count in counts.items():
            run = partial(shrink_part, name=name, num_parts=num_parts) if parts else partial(shrink, name=name)
            programs.append((count, run))
        num_shrink = sum(count for count, _ in programs)
    for names in [group.gated] if group.gated else [(name,) for name in weights]:
        out = weights[names[0]].shape[1]
        whole = jax.ShapeDtypeStruct((batch, out), group.out_dtype)
        partial_sums = jax.ShapeDtypeStruct((splits, batch, out), jnp.float32)
        outs["y"][names[0]] = whole if splits == 1 else partial_sums
        programs.append((splits * pl.cdiv(out, tile_m), partial(linear, names=names, num_shrink=num_shrink)))

    def kernel(refs: dict[str, Any], outs: dict[str, Any]) -> None:
        program, first = pl.program_id(0), 0
        launch = Launch(refs, outs, group, zero=program * 0, interpret=interpret)
        for count, run in programs:
            pl.when((program >= first) & (program < first + count))(partial(run, launch, tile=program - first))
            first += count

    kernel.__name__ = "_".join(("linear", *weights))  # the name in profiles
    found = triton_call.launch(
        kernel, refs, outs, grid=(sum(count for count, _ in programs),), updated=["ready"], interpret=interpret,
        num_warps=group.tiles.num_warps, num_stages=group.tiles.num_stages,
    )  # fmt: skip
    y = found["y"]
    if splits > 1:
        for name in y:
            total = y[name].sum(axis=0)
            if biases is not None and name in biases:
                total += biases[name][layer[0]].astype(jnp.float32)
            if residual is not None:
                total += residual.astype(jnp.float32)
            y[name] = total.astype(group.out_dtype)
    return y, found["ready"]


def _validate(
    x: Array,
    weights: dict[str, Any],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    norm: Array | None,
    group: Group,
) -> None:
    if not weights or a.keys() != b.keys() or not a.keys() <= weights.keys():
        raise ValueError(
            f"a and b must name the same linears, all of them in weights: {sorted(weights)}, {sorted(a)}, {sorted(b)}"
        )
    first = next(iter(weights.values()))
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x is {x.dtype}{x.shape}; it must be [B, in] in bfloat16, float16 or float32")
    splits = group.tiles.splits * group.tiles.shrink_splits
    if splits > 1 and (len(x) == 1 or isinstance(first, QuantArray) or (group.gated and group.tiles.splits > 1)):
        raise ValueError(f"splits are for several rows, plain weights and linears of their own: {group}")
    if reason := unsupported_reason(len(x), a, weights):
        raise ValueError(f"pregated_linear cannot run: {reason}")
    if norm is not None and len(x) > 1:
        raise ValueError(f"the norm is for one row, and there are {len(x)}")
    (batch, in_dim), num_layers = x.shape, next(iter(weights.values())).shape[0]
    expected: list[tuple[str, str, Array | QuantArray, tuple[int, ...]]] = [
        ("W", name, w, (num_layers, w.shape[1], in_dim)) for name, w in weights.items()
    ]
    layouts = {w.layout if isinstance(w, QuantArray) else None for w in weights.values()}
    if len(layouts) > 1 or not layouts <= {None, QuantLayout(8), *(QuantLayout(4, size) for size in GROUP_SIZES)}:
        names = [layout and layout.name for layout in layouts]
        raise ValueError(
            f"weights are {names}; they must have one layout: plain, int8, or int4 in groups of {GROUP_SIZES}"
        )
    if a:
        num_used = () if mixture is None else jnp.shape(mixture.experts)
        if mixture is None or len(num_used) != 1 or not num_used[0] or mixture.gates.shape != (*num_used, batch):
            given = None if mixture is None else (mixture.experts.shape, mixture.gates.shape)
            raise ValueError(f"mixture {given} must have experts [U] and gates [U, {batch}]")
        _, num_experts, rank, _ = next(iter(a.values())).shape
        for name in a:
            expected.append(("A", name, a[name], (num_layers, num_experts, rank, in_dim)))
            expected.append(("B", name, b[name], (num_layers, num_experts, weights[name].shape[1], rank)))
    for label, name, array, shape in expected:
        if array.shape != shape or (array.dtype != x.dtype and not isinstance(array, QuantArray)):
            raise ValueError(
                f"{name}: {label} is {array.dtype}{array.shape}; beside x and the others it must be {x.dtype}{shape}"
            )
