"""Layout of a training program over a mesh with the axes data, fsdp and tensor, by the rules of `axes`.

Rows of a batch are sharded over data and fsdp. A weight that is sharded over fsdp is gathered in the body of the scan over
layers, one layer at a time, in the forward and again in the backward pass; its gradient leaves the layer sharded. What is
sharded over tensor is never gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey
from jaxtyping import Array, Float, Int

from adafuse_jax.models.layout import Layout
from adafuse_jax.parallel.axes import DATA, FSDP, Axes, logical_axes, partition_spec

ROWS: Axes = ("batch", None, None)


@dataclass(frozen=True)
class MeshLayout(Layout):
    """Layout over `mesh`, whose devices are in the order of the processes."""

    mesh: Mesh

    def sharding(self, axes: Axes) -> NamedSharding:
        """Sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, partition_spec(axes, self.mesh.axis_names))

    def embedded(self, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding. Each device looks up its part of D for the rows of all fsdp devices, and they exchange
        parts; no device has the whole table."""
        partial_rows = NamedSharding(self.mesh, PartitionSpec(DATA))
        parts = NamedSharding(self.mesh, PartitionSpec(DATA, None, FSDP))
        return self.activations(with_sharding_constraint(table[with_sharding_constraint(tokens, partial_rows)], parts))

    def activations(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return with_sharding_constraint(x, self.sharding(ROWS))

    def layer[Weights](self, weights: Weights) -> Weights:
        def gather(path: tuple[Any, ...], leaf: Array) -> Array:
            return self._gathered(leaf, logical_axes(path)[1:])

        return jax.tree_util.tree_map_with_path(gather, weights)

    def head[Weights](self, head: Weights, *, is_tied: bool) -> Weights:
        name = GetAttrKey("embed_tokens" if is_tied else "lm_head")
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self._gathered(leaf, logical_axes((name, *path))), head
        )

    def _gathered(self, leaf: Array, axes: Axes) -> Array:
        kept = partition_spec(axes, [axis for axis in self.mesh.axis_names if axis != FSDP])
        sharded, whole = self.sharding(axes), NamedSharding(self.mesh, kept)
        return leaf if sharded == whole else _whole_over_fsdp(leaf, sharded, whole)

    def body(self, body: Callable[..., Any], weights: Any, *, in_scan: bool) -> Callable[..., Any]:
        """The function, whose backward pass gathers the weights again: saved, those of all layers would be whole at once.
        Nothing is saved that has been computed from arrays with the shape of a weight alone, as its cast."""
        shapes = {tuple(sorted(leaf.shape[1:])) for leaf in jax.tree.leaves(weights)}

        def is_saved(_: Any, *inputs: Any, **__: Any) -> bool:
            arrays = [aval for aval in inputs if aval.ndim > 0]
            return not (arrays and all(tuple(sorted(aval.shape)) in shapes for aval in arrays))

        return jax.checkpoint(body, policy=is_saved, prevent_cse=not in_scan)

    def attention(self, attend: Callable[..., Array]) -> Callable[..., Array]:
        rows, heads = self.sharding(("batch",)).spec, self.sharding(("batch", None, "heads")).spec

        def attend_shards(q: Array, k: Array, v: Array, visibility: Any, window: int | None = None) -> Array:
            def spec(leaf: Array) -> PartitionSpec:
                return rows if leaf.ndim > 1 and leaf.shape[0] == q.shape[0] else PartitionSpec()

            of_shard = jax.shard_map(
                partial(attend, window=window), mesh=self.mesh,
                in_specs=(heads, heads, heads, jax.tree.map(spec, visibility)), out_specs=heads, check_vma=False,
            )  # fmt: skip
            return of_shard(q, k, v, visibility)

        return attend_shards

    def whole[Tree](self, tree: Tree) -> Tree:
        return with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def state[State](self, state: State) -> State:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: with_sharding_constraint(leaf, self.sharding(_state_axes(path, leaf))), state
        )

    def rows(self, batch_size: int) -> range:
        indices = self.sharding(("batch",)).addressable_devices_indices_map((batch_size,)).values()
        ranges = [range(batch_size)[index[0]] for index in indices if index is not None]
        return range(min(rows.start for rows in ranges), max(rows.stop for rows in ranges))

    def batch(self, rows: Any, batch_size: int, *, axis: int = 0) -> Any:
        sharding = self.sharding((*[None] * axis, "batch"))

        def place(leaf: np.ndarray) -> Array:
            shape = (*leaf.shape[:axis], batch_size, *leaf.shape[axis + 1 :])
            return jax.make_array_from_process_local_data(sharding, leaf, shape)

        return jax.tree.map(place, rows)

    def host(self, array: Array) -> np.ndarray:
        return process_allgather(array, tiled=True)


def _state_axes(path: tuple[Any, ...], leaf: Array) -> Axes:
    """Logical axes of a leaf of a training state: counters and keys have none, moments those of their parameter."""
    return logical_axes(path) if leaf.ndim else ()


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole_over_fsdp(leaf: Array, sharded: NamedSharding, whole: NamedSharding) -> Array:
    """The leaf whole over fsdp; its gradient is sharded as it is."""
    return with_sharding_constraint(with_sharding_constraint(leaf, sharded), whole)


def _whole_forward(leaf: Array, sharded: NamedSharding, whole: NamedSharding) -> tuple[Array, None]:
    return _whole_over_fsdp(leaf, sharded, whole), None


def _whole_backward(sharded: NamedSharding, whole: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (with_sharding_constraint(gradient, sharded),)


_whole_over_fsdp.defvjp(_whole_forward, _whole_backward)
