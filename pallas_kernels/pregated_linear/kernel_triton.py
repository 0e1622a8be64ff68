"""The linears that share an input, with their experts, in one kernel launch on any NVIDIA GPU since Ampere (Pallas, Triton).

    y = W h + bias + Σ_u B[e_u] t_u  (+ residual)        t_u = round(g_u · A[e_u] h)        h = x or x / rms(x) · norm
    y = silu(y_gate) · y_up                              of a gated pair

A program has `tile_m` rows of one matrix, or the same rows of a gated pair, and takes `tile_k` columns at a time. The first
programs shrink: their matrices are the A of the experts in use, and they publish t and count themselves in `ready`. The others
have rows of some W, and add B t at the end, when t has long been stored. Should it not be, they wait: programs start in the
order of their ids, and those that shrink come first and wait for nothing.

One row is multiplied with fp32 FMA; several, padded to 16 or 32, on tensor cores. Sums are fp32, and y is rounded once. W, A and
B are the stacks of all layers, so a layer costs no copy of its slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.megakernel.mixture import Mixture, used_first

MAX_BATCH = 32
MAX_RANK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A program has `tile_m` rows of a matrix and takes `tile_k` columns of it at a time."""

    tile_m: int
    tile_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What a launch depends on besides its operands' shapes and types.

    `gated`: (gate, up), the two linears that make one output, silu(gate) · up. `eps`: of the norm in front. `counter`: the group's place
    among the `counters` that a layer has in `ready`.
    """

    tiles: Tiles
    out_dtype: Any
    gated: tuple[str, str] | None = None
    eps: float = 0.0
    counter: int = 0
    counters: int = 1


def tiles_for(batch: int, outs: Sequence[int], in_dim: int, itemsize: int, gated: bool) -> Tiles:
    """Rows few enough that a small linear fills the GPU, columns enough that loads are long."""
    if batch == 1:
        tile_k = min(1024 // itemsize, _power_of_2(in_dim))
        return Tiles(tile_m=4 if gated else 8, tile_k=tile_k, num_warps=4, num_stages=1)
    if itemsize == 4:  # products without tensor cores, which take more registers
        return Tiles(tile_m=32, tile_k=32, num_warps=4, num_stages=3)
    return Tiles(tile_m=32, tile_k=min(128, _power_of_2(in_dim)), num_warps=4, num_stages=4)


def unsupported_reason(x: Array, a: dict[str, Array]) -> str | None:
    """The reason why the kernel does not support these shapes, or None."""
    if x.shape[0] > MAX_BATCH:
        return f"there are {x.shape[0]} rows, and a program takes {MAX_BATCH}"
    for name, factor in a.items():
        if factor.shape[2] > MAX_RANK:
            return f"{name} has rank {factor.shape[2]}, and a program takes {MAX_RANK}"
    return None


def _power_of_2(n: int) -> int:
    return pl.next_power_of_2(n)


@dataclass(frozen=True, slots=True)
class _Launch:
    """The refs of a launch and the sizes that its programs share.

    `zero`: a 0 that is not known when tracing, for slices that begin there and, masked, exceed their array.
    """

    refs: dict[str, Any]
    outs: dict[str, Any]
    group: Group
    zero: Array
    interpret: bool

    @property
    def batch(self) -> int:
        return self.refs["x"].shape[0]

    @property
    def columns(self) -> int:
        """Columns of a product: rows of x, padded to what tensor cores take."""
        return 1 if self.batch == 1 else max(16, _power_of_2(self.batch))

    @property
    def in_dim(self) -> int:
        return self.refs["x"].shape[1]

    def times_h(self, matrices: Sequence[tuple[Any, tuple]], row: Any) -> list[Array]:
        """M h of each matrix (stack, its indices) for rows `row`…, [tile_m, columns] in fp32."""
        tiles, norm = self.group.tiles, self.refs["norm"]
        vector = self.columns == 1
        width = tiles.tile_k if vector else self.columns

        def load(i: Array) -> list[Array]:
            k = i * tiles.tile_k
            inside = None if self.in_dim % tiles.tile_k == 0 else k + jnp.arange(tiles.tile_k) < self.in_dim
            found = [self._tile(m, row, k, inside) for m in matrices]
            if not vector:
                return [*found, self._load_x(k, inside)]  # [columns, tile_k]
            found.append(_load(self.refs["x"].at[self.zero, pl.ds(k, tiles.tile_k)], inside))
            if norm is not None:
                found.append(_load(norm.at[self.refs["layer"][0], pl.ds(k, tiles.tile_k)], inside))
            return found

        def multiply(loaded: list[Array], totals: list[Array], squares: Array) -> tuple[list[Array], Array]:
            tiles_of_m, (x, *weight) = loaded[: len(matrices)], loaded[len(matrices) :]
            if not vector:
                return [t + _dot(m, x) for t, m in zip(totals, tiles_of_m, strict=True)], squares
            h = x.astype(jnp.float32)
            if weight:
                squares, h = squares + h * h, h * weight[0].astype(jnp.float32)
            return [t + m.astype(jnp.float32) * h[None] for t, m in zip(totals, tiles_of_m, strict=True)], squares

        def step(i: Array, carry: tuple) -> tuple:
            *sums, loaded = carry
            following = load(i + 1) if ahead else loaded
            return *multiply(loaded if ahead else load(i), *sums), following

        zeros = [jnp.zeros((tiles.tile_m, width), jnp.float32) for _ in matrices]
        squares = jnp.zeros(tiles.tile_k if vector and norm is not None else 1, jnp.float32)
        steps = pl.cdiv(self.in_dim, tiles.tile_k)
        ahead = vector and tiles.num_stages > 1  # the compiler pipelines the loads of tensor cores only
        loaded = load(self.zero) if ahead else []
        totals, squares, loaded = lax.fori_loop(0, steps - ahead, step, (zeros, squares, loaded))
        if ahead:
            totals, squares = multiply(loaded, totals, squares)
        if vector:
            totals = [jnp.sum(total, axis=1, keepdims=True) for total in totals]
        if norm is None:
            return totals
        scale = lax.rsqrt(jnp.sum(squares) / self.in_dim + self.group.eps)
        return [total * scale for total in totals]

    def _tile(self, matrix: tuple[Any, tuple], row: Any, k: Array, inside: Array | None) -> Array:
        (stack, indices), tiles = matrix, self.group.tiles
        mask = None if inside is None else inside[None]
        if stack.shape[-2] % tiles.tile_m:
            in_rows = (row + jnp.arange(tiles.tile_m) < stack.shape[-2])[:, None]
            mask = in_rows if mask is None else in_rows & mask
        if mask is not None:
            mask = jnp.broadcast_to(mask, (tiles.tile_m, tiles.tile_k))
        return _load(stack.at[*indices, pl.ds(row, tiles.tile_m), pl.ds(k, tiles.tile_k)], mask)

    def _load_x(self, k: Array, inside: Array | None) -> Array:
        tile_k = self.group.tiles.tile_k
        mask = None if inside is None else inside[None]
        if self.batch != self.columns:
            in_batch = (jnp.arange(self.columns) < self.batch)[:, None]
            mask = in_batch if mask is None else in_batch & mask
        if mask is not None:
            mask = jnp.broadcast_to(mask, (self.columns, tile_k))
        return _load(self.refs["x"].at[pl.ds(self.zero, self.columns), pl.ds(k, tile_k)], mask)

    def count(self, at: Array, more: Array) -> Array:
        """Add to the number of programs that have published t; returns what it was."""
        return plgpu.atomic_add(self.outs["ready"], (at,), more)

    def counter(self) -> Array:
        return self.refs["layer"][0] * self.group.counters + self.group.counter

    def gate(self, u: Any) -> Array:
        """[columns], the gates of expert u."""
        columns = jnp.arange(self.columns)
        return plgpu.load(self.refs["gates"].at[u, pl.ds(self.zero, self.columns)], mask=columns < self.batch, other=0.0)


def _load(ref: Any, mask: Array | None) -> Array:
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _dot(m: Array, x: Array) -> Array:
    """m [M, K] times x [columns, K] transposed, in fp32."""
    return plgpu.dot(m, x, trans_b=True, precision=lax.Precision.HIGHEST if m.dtype == jnp.float32 else None)


def _shrink(launch: _Launch, name: str, tile: Array) -> None:
    """Publish `tile_m` elements of t of one expert for every row."""
    group, a = launch.group, launch.refs["a"][name]
    tile_m, rank = group.tiles.tile_m, a.shape[2]
    tiles = pl.cdiv(rank, tile_m)
    u, r = tile // tiles, tile % tiles * tile_m
    expert, layer, gate = launch.refs["experts"][u], launch.refs["layer"][0], launch.gate(u)
    in_use = jnp.max(jnp.where(gate != 0, 1, 0)) > 0  # of an expert that no row uses nothing is read

    @pl.when(in_use)
    def _store() -> None:
        (product,) = launch.times_h([(a, (layer, expert))], r)
        t = jnp.where(gate[None] != 0, product * gate[None], 0).astype(launch.refs["x"].dtype)  # [tile_m, columns]
        mask = (jnp.arange(launch.columns) < launch.batch)[:, None] & (r + jnp.arange(tile_m) < rank)[None]
        at = launch.outs["t"][name].at[u, pl.ds(launch.zero, launch.columns), pl.ds(r, tile_m)]
        plgpu.store(at, t.T, mask=mask)

    if not launch.interpret:
        plgpu.debug_barrier()  # all of t is stored before it counts
    launch.count(launch.counter(), launch.zero + 1)


def _linear(launch: _Launch, names: Sequence[str], tile: Array, num_shrink: int) -> None:
    """Compute `tile_m` rows of one linear, or of a gated pair."""
    refs, group = launch.refs, launch.group
    tile_m, layer, out = group.tiles.tile_m, refs["layer"][0], refs["w"][names[0]].shape[1]
    row = tile * tile_m
    adapted = [name for name in names if name in refs["a"]]
    early = {name: _factors_of_one_row(launch, name, row) for name in adapted if launch.columns == 1}
    totals = launch.times_h([(refs["w"][name], (layer,)) for name in names], row)
    if adapted:
        at, zero = launch.counter(), launch.zero
        lax.while_loop(lambda n: n < num_shrink, lambda _: launch.count(at, zero), zero)
        for i, name in enumerate(names):
            if name in early:
                totals[i] += _expand_one_row(launch, name, early[name])
            elif name in adapted:
                totals[i] += _expand(launch, name, row)
    in_rows = row + jnp.arange(tile_m) < out
    for i, name in enumerate(names):
        if (bias := refs["bias"].get(name)) is not None:
            at = bias.at[layer, pl.ds(row, tile_m)]
            totals[i] += plgpu.load(at, mask=in_rows, other=jnp.zeros((), bias.dtype)).astype(jnp.float32)[:, None]
    y = totals[0] if not group.gated else jax.nn.sigmoid(totals[0]) * totals[0] * totals[1]
    mask = (jnp.arange(launch.columns) < launch.batch)[:, None] & in_rows[None]
    at: Any = (pl.ds(launch.zero, launch.columns), pl.ds(row, tile_m))
    y = y.T
    if (residual := refs["residual"]) is not None:
        y += plgpu.load(residual.at[at], mask=mask, other=jnp.zeros((), residual.dtype)).astype(jnp.float32)
    plgpu.store(launch.outs["y"][names[0]].at[at], y.astype(group.out_dtype), mask=mask)


def _factors_of_one_row(launch: _Launch, name: str, row: Array) -> list[Array]:
    """B [tile_m, R] of each expert, asked for first and used last."""
    b, refs, tile_m = launch.refs["b"][name], launch.refs, launch.group.tiles.tile_m
    out, rank = b.shape[2:]
    width = _power_of_2(rank)
    inside = (row + jnp.arange(tile_m) < out)[:, None] & (jnp.arange(width) < rank)[None]
    found = []
    for u in range(len(refs["experts"])):
        at = b.at[refs["layer"][0], refs["experts"][u], pl.ds(row, tile_m), pl.ds(launch.zero, width)]
        found.append(_load(at, inside & (refs["gates"][u, 0] != 0)))
    return found


def _expand_one_row(launch: _Launch, name: str, factors: list[Array]) -> Array:
    t, gates = launch.outs["t"][name], launch.refs["gates"]
    width, rank = factors[0].shape[1], t.shape[2]
    added = jnp.zeros(factors[0].shape, jnp.float32)
    for u, b in enumerate(factors):
        t_u = _load(t.at[launch.zero + u, launch.zero, pl.ds(launch.zero, width)], (jnp.arange(width) < rank) & (gates[u, 0] != 0))
        added += b.astype(jnp.float32) * t_u.astype(jnp.float32)[None]
    return jnp.sum(added, axis=1, keepdims=True)


def _expand(launch: _Launch, name: str, row: Array) -> Array:
    """Σ_u B[e_u] t_u, [tile_m, columns], over the experts in use."""
    b, refs, tile_m = launch.refs["b"][name], launch.refs, launch.group.tiles.tile_m
    out, rank = b.shape[2:]
    width = max(16, _power_of_2(rank))
    in_rank = (jnp.arange(width) < rank)[None]
    inside = (row + jnp.arange(tile_m) < out)[:, None] & in_rank
    in_batch = (jnp.arange(launch.columns) < launch.batch)[:, None] & in_rank

    def step(u: Array, total: Array) -> Array:
        b_u = _load(b.at[refs["layer"][0], refs["experts"][u], pl.ds(row, tile_m), pl.ds(launch.zero, width)], inside)
        t_u = _load(launch.outs["t"][name].at[u, pl.ds(launch.zero, launch.columns), pl.ds(launch.zero, width)], in_batch)
        return total + _dot(b_u, t_u)

    zeros = jnp.zeros((tile_m, launch.columns), jnp.float32)
    return lax.fori_loop(0, refs["num_used"][0], step, zeros)


def _run(refs: dict[str, Any], outs: dict[str, Any], *, group: Group, programs: list, interpret: bool) -> None:
    program, first = pl.program_id(0), 0
    launch = _Launch(refs, outs, group, zero=program * 0, interpret=interpret)
    for count, run in programs:
        pl.when((program >= first) & (program < first + count))(partial(run, launch, tile=program - first))
        first += count


@partial(jax.jit, static_argnames=("group", "interpret"))
def launch_group(
    x: Float[Array, "B in"],
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    num_used: Int[Array, "1"],
    layer: Int[Array, "1"],
    ready: Int[Array, " layers*counters"],
    *,
    group: Group,
    norm: Float[Array, "L in"] | None = None,
    biases: dict[str, Array] | None = None,
    residual: Float[Array, "B out"] | None = None,
    interpret: bool = False,
) -> tuple[dict[str, Array], Array]:
    """(name → y [B, out], ready). The y of a gated pair has the gate's name. The `num_used` experts in use are
    in front in `mixture`. The group's counter in `ready` is 0 before, and after it the number of programs that shrink."""
    batch, tile_m = x.shape[0], group.tiles.tile_m
    outs: dict[str, Any] = {"y": {}, "t": {}, "ready": jax.ShapeDtypeStruct(ready.shape, ready.dtype)}
    programs: list[tuple[int, Callable]] = []
    refs: dict[str, Any] = {"ready": ready, "x": x, "layer": layer, "w": weights, "a": a, "b": b, "bias": biases or {}}
    refs |= {"norm": norm, "residual": residual}
    num_shrink = 0
    if a:
        assert mixture is not None
        refs |= {"experts": mixture.experts, "gates": mixture.gates, "num_used": num_used}
        max_used = len(mixture.experts)
        for name, factor in a.items():
            rank = factor.shape[2]
            outs["t"][name] = jax.ShapeDtypeStruct((max_used, batch, rank), x.dtype)
            programs.append((max_used * pl.cdiv(rank, tile_m), partial(_shrink, name=name)))
        num_shrink = sum(count for count, _ in programs)
    for linears in [group.gated] if group.gated else [(name,) for name in weights]:
        out = weights[linears[0]].shape[1]
        outs["y"][linears[0]] = jax.ShapeDtypeStruct((batch, out), group.out_dtype)
        programs.append((pl.cdiv(out, tile_m), partial(_linear, names=linears, num_shrink=num_shrink)))
    order = jax.tree.leaves_with_path(refs), jax.tree.leaves_with_path(outs)
    places = [next(i for i, (path, _) in enumerate(leaves) if path[0].key == "ready") for leaves in order]

    def kernel(refs: dict[str, Any], outs: dict[str, Any]) -> None:
        _run(refs, outs, group=group, programs=programs, interpret=interpret)

    kernel.__name__ = "_".join(("linear", *weights))  # what profiles show
    found = pl.pallas_call(
        kernel,
        out_shape=outs,
        grid=(sum(count for count, _ in programs),),
        input_output_aliases={places[0]: places[1]},
        compiler_params=plgpu.CompilerParams(num_warps=group.tiles.num_warps, num_stages=group.tiles.num_stages),
        interpret=interpret,
    )(refs)
    return found["y"], found["ready"]


def pregated_linear_triton(
    x: Float[Array, "B in"],
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    layer: int | Int[Array, ""],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> dict[str, Array]:
    """See `pallas_kernels.pregated_linear.pregated_linear`. Raises `ValueError` with an `unsupported_reason`."""
    if reason := unsupported_reason(x, a):
        raise ValueError(f"pregated_linear cannot run as triton: {reason}")
    first = next(iter(weights.values()))
    outs = [w.shape[1] for w in weights.values()]
    tiles = tiles or tiles_for(len(x), outs, x.shape[1], x.dtype.itemsize, gated=False)
    num_used = jnp.zeros(1, jnp.int32)
    if mixture is not None:
        num_used = (mixture.gates != 0).any(axis=1).sum(dtype=jnp.int32)[None]
        mixture = used_first(mixture)[0] if len(x) > 1 else mixture
    ready = jnp.zeros(len(first), jnp.int32)
    group, at = Group(tiles=tiles, out_dtype=x.dtype), jnp.asarray(layer, jnp.int32)[None]
    return launch_group(x, weights, a, b, mixture, num_used, at, ready, group=group, interpret=interpret)[0]
