"""Placement of a checkpoint's tensors: each leaf of the backbone is made from its tensors, read one at a time.

stacked leaf [L, …] ← the tensors […] of layers 0 … L−1
other leaf    […]   ← one tensor […]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from adafuse_jax.parallel.axes import Axes, partition_spec


class Placement(Protocol):
    def __call__(
        self, path: tuple[Any, ...], axes: Axes, leaf: jax.ShapeDtypeStruct, tensors: Iterator[np.ndarray]
    ) -> tuple[Any, Bool[Array, " tensors"]]:
        """Make the leaf at `path` of the backbone, with logical `axes` and the shape and type of `leaf`.

        Returns it, and whether all values of each tensor are finite in its type.
        """


@dataclass(frozen=True, slots=True)
class Stacked:
    """Arrays on the default device, or over a mesh: each device then gets its slice of every tensor and no other."""

    mesh: Mesh | None = None

    def __call__(
        self, path: tuple[Any, ...], axes: Axes, leaf: jax.ShapeDtypeStruct, tensors: Iterator[np.ndarray]
    ) -> tuple[Array, Bool[Array, " tensors"]]:
        if axes[0] != "layers":
            array = self._placed(next(tensors), axes).astype(leaf.dtype)
            return array, jnp.isfinite(array).all()[None]
        stack = jnp.zeros(leaf.shape, leaf.dtype, device=self._sharding(axes))
        finite = jnp.ones(leaf.shape[0], bool)
        for layer, tensor in enumerate(tensors):
            placed = self._placed(tensor, axes[1:])
            # Waiting keeps one tensor in flight; without it the host queues as many copies as it can read.
            stack, finite = jax.block_until_ready(_set_layer(stack, finite, jnp.int32(layer), placed))
        return stack if self.mesh is None else jax.device_put(stack, self._sharding(axes)), finite

    def _placed(self, tensor: np.ndarray, axes: Axes) -> Array:
        """The tensor on the devices. Over a mesh this process, which has read all of it, places the parts of its devices."""
        sharding = self._sharding(axes)
        if sharding is None:
            return jax.device_put(tensor)
        return jax.make_array_from_callback(tensor.shape, sharding, tensor.__getitem__)

    def _sharding(self, axes: Axes) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, partition_spec(axes, self.mesh.axis_names))


@partial(jax.jit, donate_argnums=(0, 1))
def _set_layer(
    stack: Array, finite: Bool[Array, " L"], layer: Int[Array, ""], tensor: Array
) -> tuple[Array, Bool[Array, " L"]]:
    """Write `tensor` at `layer` of `stack`, and to `finite` whether all of it is."""
    cast = tensor.astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, cast, layer, axis=0)
    return stack, finite.at[layer].set(jnp.isfinite(cast).all())
