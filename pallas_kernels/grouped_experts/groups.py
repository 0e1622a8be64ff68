"""Tokens sorted so that neighbours share experts, cut into tiles; every expert that a tile uses is one item of work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE = 64
"""Tokens of a tile."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Groups:
    """Items of work: one expert and one tile of the sorted tokens, some of which chose it.

    The tokens are sorted by their set of experts, in one pass over all k choices; where there are too many sets for that,
    by one choice after the other, in k passes of one choice each. The items of a tile follow each other.

    order         token at each place of the sort
    tile          tile of an item, counted through all passes
    expert        expert of an item
    start         first item of each tile, and the number of items
    by_expert     items in the order of their experts
    expert_start  where an expert begins in `by_expert`, and the number of items

    Items behind the last one, up to the static bound I, are not computed and not read.
    """

    order: Int[Array, "passes T"]
    tile: Int[Array, " I"]
    expert: Int[Array, " I"]
    start: Int[Array, " tiles+1"]
    by_expert: Int[Array, " I"]
    expert_start: Int[Array, " E+1"]

    @property
    def num_experts(self) -> int:
        return len(self.expert_start) - 1


def num_passes(tokens: int, num_experts: int, top_k: int) -> int:
    """1 where a tile has few sets of experts, else k."""
    return 1 if math.comb(num_experts, top_k) * TILE <= 2 * tokens else top_k


def max_items(tokens: int, num_experts: int, top_k: int) -> int:
    """Static bound of the items: a tile has the experts of its first set, and those of each set that begins in it."""
    passes, tiles = num_passes(tokens, num_experts, top_k), tokens // TILE
    if passes == 1:
        return min(tiles * num_experts, top_k * (tiles + math.comb(num_experts, top_k)))
    return passes * min(tiles * num_experts, tiles + num_experts)


def group_tokens(chosen: Int[Array, "T k"], num_experts: int) -> Groups:
    """The groups of tokens whose experts are `chosen`; T is a multiple of `TILE`."""
    tokens, top_k = chosen.shape
    bound = max_items(tokens, num_experts, top_k)
    if num_passes(tokens, num_experts, top_k) == 1:
        order, choices = order_of_sets(jnp.sort(chosen, axis=-1))[None], chosen[None]
    else:
        order, choices = jnp.argsort(chosen.T, axis=-1), chosen.T[..., None]
    sorted_choices = jnp.take_along_axis(choices, order[..., None], axis=1).reshape(-1, TILE * choices.shape[-1])
    uses = (sorted_choices[..., None] == jnp.arange(num_experts)).any(axis=1)  # [tiles of all passes, E]
    tile, expert = jnp.nonzero(uses, size=bound, fill_value=0)
    items = uses.sum()
    by_expert = jnp.argsort(jnp.where(jnp.arange(bound) < items, expert, num_experts))
    return Groups(
        order=order.astype(jnp.int32),
        tile=tile.astype(jnp.int32),
        expert=expert.astype(jnp.int32),
        start=_starts(uses.sum(axis=1)),
        by_expert=by_expert.astype(jnp.int32),
        expert_start=_starts(uses.sum(axis=0)),
    )


def gates_of_items(gates: Float[Array, "T k"], chosen: Int[Array, "T k"], groups: Groups) -> Float[Array, "I tile"]:
    """The gate that each token of an item's tile gives the item's expert; 0 for the tokens that did not choose it in the
    item's pass."""
    passes, tokens = groups.order.shape
    part, tile = groups.tile // (tokens // TILE), groups.tile % (tokens // TILE)
    rows = groups.order.reshape(passes, -1, TILE)[part, tile]  # [I, TILE]
    mine = chosen[rows] == groups.expert[:, None, None]
    if passes > 1:
        mine &= jnp.arange(chosen.shape[1]) == part[:, None, None]
    return jnp.where(mine, gates[rows], 0).sum(axis=-1)


def order_of_sets(members: Int[Array, "T k"]) -> Int[Array, " T"]:
    """Order of sets, each sorted, in which the next set mostly differs in one expert: the last expert goes up and down."""
    *first, last = members.T
    if first:
        last = jnp.where(first[-1] % 2, -last, last)
    return jnp.lexsort((last, *reversed(first)))


def _starts(counts: Int[Array, " n"]) -> Int[Array, " n+1"]:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
