"""Tokens in two orders: pairs of a token and an expert that it chose, by expert; and tokens, by their sets of experts.

`shrink` multiplies tiles of pairs that share an expert, every pair once. `expand` adds up what the experts give to a
token, and so takes tiles of tokens, of neighbouring sets, with every expert that one of them chose.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_experts.groups import order_of_sets

PAIR_TILE, TOKEN_TILE = 128, 64
"""Pairs of a tile by expert; tokens of a tile by sets of experts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Pairs:
    """Orders of T tokens with k experts each.

    token         token of each place among the pairs by expert; T in places without a pair
    gate          s · gate of each place; 0 without a pair
    expert        expert of each tile of pairs; E behind the last tile
    order         tokens by their sets of experts
    used          experts of each tile of `order`: their numbers come first, in the order of `count`
    count         experts of each tile of `order`
    place         place of the pair of each token of a tile and each expert of the tile; P without a pair
    """

    token: Int[Array, " P"]
    gate: Float[Array, " P"]
    expert: Int[Array, " pair_tiles"]
    order: Int[Array, " T"]
    used: Int[Array, "tiles E"]
    count: Int[Array, " tiles"]
    place: Int[Array, "tiles E tile"]


def pair_tokens(chosen: Int[Array, "T k"], gates: Float[Array, "T k"], num_experts: int, scale: float) -> Pairs:
    """The orders of tokens whose experts are `chosen`. Gates of equal ones are added; a gate of 0 chooses nothing. T is a
    multiple of `TOKEN_TILE`."""
    tokens, top_k = chosen.shape
    tiles = -(-tokens * top_k // PAIR_TILE) + num_experts
    is_chosen = chosen[:, :, None] == jnp.arange(num_experts)  # [T, k, E]
    gate = jnp.where(is_chosen, gates[:, :, None], 0).sum(axis=1) * scale  # [T, E]
    uses = gate != 0
    counts = uses.sum(axis=0)
    padded = -(-counts // PAIR_TILE) * PAIR_TILE
    ends = jnp.cumsum(padded)
    rank = jnp.cumsum(uses, axis=0) - 1  # of a token among those that chose the expert
    nowhere = tiles * PAIR_TILE
    place = jnp.where(uses, ends - padded + rank, nowhere)  # [T, E]
    numbers = jnp.broadcast_to(jnp.arange(tokens)[:, None], place.shape)
    order = order_of_sets(jnp.sort(chosen, axis=-1))
    of_tile = uses[order].reshape(-1, TOKEN_TILE, num_experts)
    is_used = of_tile.any(axis=1)  # [tiles, E]
    used = jnp.argsort(~is_used, axis=1, stable=True)
    by_tile = place[order].reshape(-1, TOKEN_TILE, num_experts)
    return Pairs(
        token=jnp.full(nowhere, tokens).at[place].set(numbers, mode="drop").astype(jnp.int32),
        gate=jnp.zeros(nowhere, jnp.float32).at[place].set(gate, mode="drop"),
        expert=jnp.searchsorted(ends, jnp.arange(tiles) * PAIR_TILE, side="right", method="compare_all").astype(
            jnp.int32
        ),
        order=order.astype(jnp.int32),
        used=used.astype(jnp.int32),
        count=is_used.sum(axis=1, dtype=jnp.int32),
        place=jnp.take_along_axis(by_tile, used[:, None], axis=2).swapaxes(1, 2).astype(jnp.int32),
    )
