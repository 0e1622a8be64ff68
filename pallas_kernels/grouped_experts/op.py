"""Low-rank experts of many tokens, only the products of the chosen ones, with their gradients.

    y[t] = s Σ_j g[t, j] · B[e_j] A[e_j] x[t]            e_j = chosen[t, j]

A dense form multiplies every token with all E experts and lets gates of zero select. This one sorts the tokens so that
neighbours share experts, and multiplies tiles of them with the experts that they use: about k + 1 per tile of `TILE` tokens
where the sets of experts are few, 2k where they are many. `saves` says where that is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.devices import triton_unsupported_reason
from pallas_kernels.grouped_experts.groups import TILE, Groups, max_items
from pallas_kernels.grouped_experts.kernel_triton import expand, outer, project

ITEM_COLUMNS = 130
"""Columns of the dense products, of E·R, that take as long as one item of a tile, of rank 64 or less: an item reads and
writes the tile's rows whatever its rank. Fitted to the shapes of `python -m benchmarks.training.experts`."""


def unsupported_reason(
    tokens: int, num_experts: int, rank: int, top_k: int, widths: Sequence[int], dtype: jnp.dtype
) -> str | None:
    """The reason why the kernels cannot run, or None. `widths`: every in and out of the adapted linears."""
    if jax.default_backend() != "gpu":
        return "no GPU"
    if (reason := triton_unsupported_reason(jax.devices()[0])) is not None:
        return reason
    if jnp.dtype(dtype).itemsize != 2:
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16 or float16"
    if tokens % TILE:
        return f"{tokens} tokens are no multiple of {TILE}"
    if rank not in (16, 32, 64, 128):
        return f"rank {rank} is none of 16, 32, 64, 128"
    if odd := [width for width in widths if width % 64]:
        return f"a width of {odd[0]} is no multiple of 64"
    if top_k >= num_experts:
        return "every token uses all experts"
    return None


def saves(tokens: int, num_experts: int, rank: int, top_k: int) -> bool:
    """True where the products of the chosen experts take less time than those of all."""
    items = max_items(tokens, num_experts, top_k) / (tokens // TILE)  # a tile's, at most
    return items * ITEM_COLUMNS * max(1, rank / 64) < num_experts * rank


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def grouped_product(
    x: Float[Array, "T in"],
    a: Float[Array, "E R in"],
    b: Float[Array, "E out R"],
    gates: Float[Array, "I tile"],
    groups: Groups,
    scale: float = 1.0,
    interpret: bool = False,
    name: str = "grouped_experts",
) -> Float[Array, "T out"]:
    """y, all products in the type of x with sums in fp32.

    Args:
      a, b: of any type; their gradients are of that type, rounded once from fp32.
      gates: see `gates_of_items`; a gate of 0 has no gradient.
      groups: see `group_tokens`; T is a multiple of `TILE`.
      interpret: run the kernels' interpreter, on any device.
      name: that of h, for the policies of `jax.checkpoint`.

    For the backward pass x and h_i = s g_i A_e x are kept.
    """
    return _forward(x, a, b, gates, groups, scale, interpret, name)[0]


def _forward(
    x: Array, a: Array, b: Array, gates: Array, groups: Groups, scale: float, interpret: bool, name: str
) -> tuple[Array, tuple[Any, ...]]:
    (h,) = project(x, a.astype(x.dtype), gates, groups, scale=scale, rank_last=False, interpret=interpret)
    h = checkpoint_name(h, name)
    y = expand(h, b.astype(x.dtype), groups, rank_last=True, interpret=interpret)
    return y, (x, a, b, gates, groups, h)


def _backward(scale: float, interpret: bool, name: str, saved: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    x, a, b, gates, groups, h = saved
    run: dict[str, Any] = {"interpret": interpret}
    du, d_gates = project(dy, b.astype(x.dtype), gates, groups, h, scale=scale, rank_last=True, **run)
    dx = expand(du, a.astype(x.dtype), groups, rank_last=False, **run)
    da = outer(du, x, groups, rank_last=False, **run).astype(a.dtype)
    db = outer(h, dy, groups, rank_last=True, **run).astype(b.dtype)
    computed = (jnp.arange(len(gates)) < groups.start[-1])[:, None]
    return dx, da, db, jnp.where(computed, d_gates, 0).astype(gates.dtype), None


grouped_product.defvjp(_forward, _backward)
