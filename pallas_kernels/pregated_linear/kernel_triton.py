"""The programs of a launch: linears that share an input, with their experts (Pallas, Triton; NVIDIA Ampere and newer).

    y = W h + bias + Σ_u B[e_u] t_u  (+ residual)        t_u = round(g_u · A[e_u] h)        h = x or x / rms(x) · norm
    y = act(y_gate) · y_up                               of a gated pair

A program has `tile_m` rows of one matrix, or the same rows of a gated pair, and takes `tile_k` columns at a time. The first
programs shrink (`kernel_experts`): their matrices are the A of the experts in use, and they publish t and count themselves
in `ready`. The others have rows of some W, with all columns or those of a split, and add B t at the end, when t has long
been stored; should it not be, they wait for the count.

A program waits for programs of lower ids only. GPUs start programs in the order of their ids, so whoever waits waits for
programs that run or have ended, however few fit at once. (CUDA does not promise the order; every kernel that waits without
tickets relies on it.)

One row is multiplied with fp32 FMA; several, padded to 16 or 32, on tensor cores. Sums are fp32, and y is rounded once. W, A
and B are the stacks of all layers, so a layer costs no copy of its slice.
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
from jaxtyping import Array

from pallas_kernels.pregated_linear import kernel_experts, kernel_quantised
from pallas_kernels.pregated_linear.triton_call import dot, load, mask_of, share
from pallas_kernels.quantised import QuantArray

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: jax.nn.sigmoid(x) * x,
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x * x * x))),
    "relu": lambda x: jnp.maximum(x, 0),
}
"""Activations that the kernel has; an exact GELU needs erf, which Pallas does not lower to Triton."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A program has `tile_m` rows of W and takes `tile_k` columns of it at a time, of a quantised one `tile_q`.

    `shrink_m`, `shrink_k`: rows and columns of A, where they are not 0. `splits`: programs that share the columns of the
    same rows of W; XLA adds their partial sums. `shrink_splits`: the same of A; the last of the programs adds them.
    """

    tile_m: int
    tile_k: int
    tile_q: int = 0
    shrink_m: int = 0
    shrink_k: int = 0
    splits: int = 1
    shrink_splits: int = 1
    num_warps: int
    num_stages: int

    @property
    def of_a(self) -> tuple[int, int]:
        """(rows, columns) of A that a program takes at a time."""
        return self.shrink_m or self.tile_m, self.shrink_k or self.tile_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Settings of a launch besides its operands' shapes and types.

    `gated`: (gate, up), the two linears that make one output, activation(gate) · up, the activation one of `ACTIVATIONS`.
    `eps`: of the norm in front. `counter`: the group's place among the `counters` that a layer has in `ready`.
    """

    tiles: Tiles
    out_dtype: Any
    gated: tuple[str, str] | None = None
    activation: str = "silu"
    eps: float = 0.0
    counter: int = 0
    counters: int = 1


@dataclass(frozen=True, slots=True)
class Launch:
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
        return 1 if self.batch == 1 else max(16, pl.next_power_of_2(self.batch))

    @property
    def in_dim(self) -> int:
        return self.refs["x"].shape[1]

    def times_h(
        self,
        matrices: Sequence[tuple[Any, tuple]],
        row: Any,
        tile: tuple[int, int],
        share: Callable[[int], tuple[Any, Any]] = lambda steps: (0, steps),
        beside: Sequence[Callable[[], None]] = (),
    ) -> list[Array]:
        """M h of each matrix (stack, its indices) for rows `row`…, [tile_m, columns] in fp32.

        `tile`: (tile_m, tile_k). `share`: number of steps through the columns → first step, last step + 1. `beside`: of
        one row, what to do while its first columns of M are under way, and what while the last are.
        """
        (tile_m, tile_k), norm = tile, self.refs["norm"]
        vector = self.columns == 1
        width = tile_k if vector else self.columns

        def load_step(i: Array) -> list[Array]:
            k = i * tile_k
            inside = None if self.in_dim % tile_k == 0 else k + jnp.arange(tile_k) < self.in_dim
            found = [self._tile(m, tile, row, k, inside) for m in matrices]
            if not vector:
                return [*found, self._load_x(tile_k, k, inside)]  # [columns, tile_k]
            found.append(load(self.refs["x"].at[self.zero, pl.ds(k, tile_k)], inside))
            if norm is not None:
                found.append(load(norm.at[self.refs["layer"][0], pl.ds(k, tile_k)], inside))
            return found

        def multiply(loaded: list[Array], totals: list[Array], squares: Array) -> tuple[list[Array], Array]:
            tiles_of_m, (x, *weight) = loaded[: len(matrices)], loaded[len(matrices) :]
            if not vector:
                return [t + dot(m, x, trans_b=True) for t, m in zip(totals, tiles_of_m, strict=True)], squares
            h = x.astype(jnp.float32)
            if weight:
                squares, h = squares + h * h, h * weight[0].astype(jnp.float32)
            return [t + m.astype(jnp.float32) * h[None] for t, m in zip(totals, tiles_of_m, strict=True)], squares

        zeros = [jnp.zeros((tile_m, width), jnp.float32) for _ in matrices]
        squares = jnp.zeros(tile_k if vector and norm is not None else 1, jnp.float32)
        sums, steps = (zeros, squares), pl.cdiv(self.in_dim, tile_k)
        ahead = vector and self.group.tiles.num_stages > 1  # the compiler pipelines the loads of tensor cores only
        if ahead or beside:
            totals, squares = self._requested_early(load_step, multiply, sums, steps, ahead, beside)
        else:
            totals, squares = lax.fori_loop(*share(steps), lambda i, sums: multiply(load_step(i), *sums), sums)
        if vector:
            totals = [jnp.sum(total, axis=1, keepdims=True) for total in totals]
        if norm is None:
            return totals
        scale = lax.rsqrt(jnp.sum(squares) / self.in_dim + self.group.eps)
        return [total * scale for total in totals]

    def _requested_early(
        self, load_step: Callable, multiply: Callable, sums: Any, steps: int, ahead: bool, beside: Sequence[Callable]
    ) -> Any:
        """The sums of all steps; `ahead` of each product the next step's columns are requested."""

        def step(i: Array, carry: tuple) -> tuple:
            loaded, sums = carry
            return load_step(i + 1), multiply(loaded, *sums)

        early, late = beside or (lambda: None, lambda: None)
        loaded = load_step(self.zero)
        early()
        if ahead:
            loaded, sums = lax.fori_loop(0, steps - 1, step, (loaded, sums))
        elif steps > 1:
            sums = multiply(loaded, *sums)
            sums = lax.fori_loop(1, steps - 1, lambda i, sums: multiply(load_step(i), *sums), sums)
            loaded = load_step(self.zero + (steps - 1))
        late()
        return multiply(loaded, *sums)

    def _tile(
        self, matrix: tuple[Any, tuple], tile: tuple[int, int], row: Any, k: Array, inside: Array | None
    ) -> Array:
        (stack, indices), (tile_m, tile_k) = matrix, tile
        rows = row + jnp.arange(tile_m) < stack.shape[-2] if stack.shape[-2] % tile_m else None
        return load(stack.at[*indices, pl.ds(row, tile_m), pl.ds(k, tile_k)], mask_of(tile, rows, inside))

    def _load_x(self, tile_k: int, k: Array, inside: Array | None) -> Array:
        in_batch = None if self.batch == self.columns else jnp.arange(self.columns) < self.batch
        mask = mask_of((self.columns, tile_k), in_batch, inside)
        return load(self.refs["x"].at[pl.ds(self.zero, self.columns), pl.ds(k, tile_k)], mask)

    def count(self, at: Array, more: Array) -> Array:
        """Add to the number of programs that have published t; returns what it was."""
        return plgpu.atomic_add(self.outs["ready"], (at,), more)

    def publish(self) -> None:
        """Count this program, whose results are stored."""
        if not self.interpret:
            plgpu.debug_barrier()  # all of them are stored before they count
        self.count(self.counter(), self.zero + 1)

    def wait(self, number: int) -> None:
        """Wait until `number` programs have published t."""
        at, zero = self.counter(), self.zero
        lax.while_loop(lambda n: n < number, lambda _: self.count(at, zero), zero)

    def counter(self) -> Array:
        return self.refs["layer"][0] * self.group.counters + self.group.counter

    def gate(self, u: Any) -> Array:
        """[columns], the gates of expert u."""
        columns = jnp.arange(self.columns)
        return plgpu.load(
            self.refs["gates"].at[u, pl.ds(self.zero, self.columns)], mask=columns < self.batch, other=0.0
        )


def linear(launch: Launch, names: Sequence[str], tile: Array, num_shrink: int) -> None:
    """Compute `tile_m` rows of one linear, or of a gated pair, or their sums over a part of the columns."""
    refs, group = launch.refs, launch.group
    weights = [refs["w"][name] for name in names]
    tile_m, layer, splits = group.tiles.tile_m, refs["layer"][0], group.tiles.splits
    row, split = (tile, 0) if splits == 1 else (tile // splits, tile % splits)
    row = row * tile_m
    adapted = [name for name in names if name in refs["a"]]
    one_row = kernel_experts.OneRow(launch, adapted, row) if adapted and launch.columns == 1 else None
    ids = kernel_experts.load_ids(launch) if adapted and one_row is None else []
    beside = () if one_row is None else (one_row.load_factors, partial(one_row.load_t, num_shrink))
    if isinstance(weights[0], QuantArray):
        totals = kernel_quantised.times_h(launch, weights, row, beside)
    else:
        matrices, of_w = [(weight, (layer,)) for weight in weights], (tile_m, group.tiles.tile_k)
        totals = launch.times_h(matrices, row, of_w, partial(share, split=split, splits=splits), beside)
    if one_row is not None:
        totals = one_row.expand(names, totals)
    elif adapted:
        launch.wait(num_shrink)
        totals = kernel_experts.expand_rows(launch, names, row, totals, ids, split)
    _store(launch, names, row, split, totals)


def _store(launch: Launch, names: Sequence[str], row: Array, split: Any, totals: list[Array]) -> None:
    """Store y [columns, tile_m], or a split's partial sum of it."""
    refs, group, tile_m, y_ref = launch.refs, launch.group, launch.group.tiles.tile_m, launch.outs["y"][names[0]]
    layer, out = refs["layer"][0], y_ref.shape[-1]
    in_rows = row + jnp.arange(tile_m) < out
    for i, name in enumerate(names):
        if (bias := refs["bias"].get(name)) is not None:
            totals[i] += load(bias.at[layer, pl.ds(row, tile_m)], in_rows).astype(jnp.float32)[:, None]
    y = totals[0] if not group.gated else ACTIVATIONS[group.activation](totals[0]) * totals[1]
    mask = (jnp.arange(launch.columns) < launch.batch)[:, None] & in_rows[None]
    here: tuple[Any, ...] = pl.ds(launch.zero, launch.columns), pl.ds(row, tile_m)
    y = y.T
    if (residual := refs["residual"]) is not None:
        y += load(residual.at[here], mask).astype(jnp.float32)
    if group.tiles.splits > 1:
        here = (split, *here)
    plgpu.store(y_ref.at[here], y.astype(y_ref.dtype), mask=mask)
