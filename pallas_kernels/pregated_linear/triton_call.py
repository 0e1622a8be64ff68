"""One launch in Pallas' Triton, masked loads and products, for the kernels of the portable decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array


def launch(
    kernel: Callable[[dict[str, Any], dict[str, Any]], None],
    refs: dict[str, Any],
    outs: dict[str, Any],
    *,
    grid: tuple[int, ...],
    updated: Sequence[str],
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> dict[str, Any]:
    """`kernel(refs, outs)`, name → array or a pytree of them, in `grid` programs.

    `updated`: names in both `refs` and `outs`, which are changed in place. Raises `NotImplementedError` under `vmap`:
    programs count each other in memory that a batch of launches would share.
    """
    names = [[path[0].key for path, _ in jax.tree.leaves_with_path(tree)] for tree in (refs, outs)]

    @jax.custom_batching.custom_vmap
    def call(refs: dict[str, Any]) -> dict[str, Any]:
        return pl.pallas_call(
            kernel,
            out_shape=outs,
            grid=grid,
            input_output_aliases={names[0].index(name): names[1].index(name) for name in updated},
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=interpret,
        )(refs)

    @call.def_vmap
    def refuse(axis_size: int, in_batched: Any, refs: Any) -> Any:
        raise NotImplementedError("the kernels of the portable decode step take their rows in one call, not under vmap")

    return call(refs)


def load(ref: Any, mask: Array | None) -> Array:
    """Elements of a ref, 0 outside the mask."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
    """a b, or a bᵀ, summed in fp32; products of fp32 are exact, not TF32."""
    return plgpu.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def mask_of(shape: tuple[int, int], rows: Array | None, columns: Array | None) -> Array | None:
    """True where both are; None where neither is given."""
    of_rows, of_columns = None if rows is None else rows[:, None], None if columns is None else columns[None]
    both = of_columns if of_rows is None else of_rows if of_columns is None else of_rows & of_columns
    return None if both is None else jnp.broadcast_to(both, shape)


def share(count: int | Array, split: Any, splits: int) -> tuple[Any, Any]:
    """(first, last + 1) of the `count` things in a row that one of `splits` programs takes."""
    if splits == 1:
        return 0, count
    each = pl.cdiv(count, splits)
    return jnp.minimum(split * each, count), jnp.minimum((split + 1) * each, count)
