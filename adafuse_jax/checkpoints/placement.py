"""Placement of a checkpoint's tensors: each leaf of the backbone is filled from its tensors, read one at a time.

stacked leaf [L, …] ← the tensors […] of layers 0 … L−1
other leaf    […]   ← one tensor […]
quantised     codes and scales [L, …] ← those that a form makes of each layer's tensors, on the device
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from adafuse_jax.checkpoints.weight_forms import WeightForm
from adafuse_jax.parallel.axes import Axes, partition_spec
from pallas_kernels.quantised import QuantArray

MAX_THREADS = 4
"""Leaves that are filled at a time, at most: one tensor of each is in flight."""
ALIGNMENT = 64
"""Bytes at whose multiples JAX's arrays on the CPU begin."""
CHUNK_VALUES = 2**18
SIGN: dict[int, Any] = {2: np.uint16(2**15), 4: np.uint32(2**31)}
"""The sign bit of a value, by its bytes."""


Finite = Bool[Array, " tensors"] | Bool[np.ndarray, " tensors"]
"""True for each tensor all of whose values are finite."""


class Placement(Protocol):
    """The place of a backbone's leaves, given their logical axes. `num_threads` leaves may be filled at a time."""

    @property
    def num_threads(self) -> int: ...

    def empty(self, leaves: Sequence[tuple[Axes, jax.ShapeDtypeStruct]]) -> list[Array]:
        """Arrays of zeros of these shapes and types."""

    def fill(self, leaf: Array, axes: Axes, tensors: Iterator[np.ndarray]) -> tuple[Array, Finite]:
        """Consume an empty leaf, and return it with its tensors in it, cast to its type, and whether all values of each
        tensor are finite in that type."""

    def fill_quantised(
        self,
        leaf: QuantArray,
        axes: Axes,
        tensors: Iterator[tuple[np.ndarray, ...]],
        form: WeightForm,
        dtype: DTypeLike,
    ) -> tuple[QuantArray, Finite]:
        """`fill` of codes and scales, from the `form.parts` of each tensor. `axes` are those of W; its values are finite if
        they are in `dtype`, that of the model."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """Arrays on the default device, or over a mesh: each device then gets its slice of every tensor and no other."""

    mesh: Mesh | None = None

    @property
    def num_threads(self) -> int:
        """Over a mesh the leaves are filled in one order: whether values are finite is a reduction over the devices."""
        return 1 if self.mesh is not None else min(MAX_THREADS, os.cpu_count() or 1)

    def empty(self, leaves: Sequence[tuple[Axes, jax.ShapeDtypeStruct]]) -> list[Array]:
        if self.mesh is None and jax.default_backend() == "cpu":
            return [jax.device_put(_untouched(leaf)) for _, leaf in leaves]
        shardings = None if self.mesh is None else [self._sharding(axes) for axes, _ in leaves]
        shapes = tuple((leaf.shape, leaf.dtype) for _, leaf in leaves)
        return jax.jit(_zeros, static_argnums=0, out_shardings=shardings)(shapes)

    def fill(self, leaf: Array, axes: Axes, tensors: Iterator[np.ndarray]) -> tuple[Array, Finite]:
        if self.mesh is None and _is_on_cpu(leaf):
            return leaf, _fill_in_place(leaf, axes[0] == "layers", tensors)
        if axes[0] != "layers":
            return _set_whole(leaf, self._placed(next(tensors), axes))
        finite: Finite = np.ones(leaf.shape[0], bool)
        for layer, tensor in enumerate(tensors):
            # Waiting keeps one tensor in flight; without it the host queues as many copies as it can read.
            leaf, finite = jax.block_until_ready(
                _set_layer(leaf, finite, np.int32(layer), self._placed(tensor, axes[1:]))
            )
        return leaf if self.mesh is None else jax.device_put(leaf, self._sharding(axes)), finite

    def fill_quantised(
        self,
        leaf: QuantArray,
        axes: Axes,
        tensors: Iterator[tuple[np.ndarray, ...]],
        form: WeightForm,
        dtype: DTypeLike,
    ) -> tuple[QuantArray, Finite]:
        is_stacked = axes[0] == "layers"
        finite: Finite = np.ones(leaf.shape[0] if is_stacked else 1, bool)
        part_axes = form.axes(axes[1:] if is_stacked else axes)
        for layer, parts in enumerate(tensors):
            placed = tuple(map(self._placed, parts, part_axes))
            at = np.int32(layer) if is_stacked else None
            leaf, finite = jax.block_until_ready(_set_quantised(leaf, finite, at, placed, form, jnp.dtype(dtype)))
        if self.mesh is None:
            return leaf, finite
        scale_axes = axes if leaf.layout.group_size else axes[:-1]
        codes, scales = (
            jax.device_put(x, self._sharding(of)) for x, of in ((leaf.codes, axes), (leaf.scales, scale_axes))
        )
        return QuantArray(codes, scales, leaf.layout), finite

    def _placed(self, tensor: np.ndarray, axes: Axes) -> Array:
        """The tensor on the devices. Over a mesh this process, which has read all of it, places the parts of its devices."""
        sharding = self._sharding(axes)
        if sharding is None:
            return jax.device_put(tensor)
        return jax.make_array_from_callback(tensor.shape, sharding, tensor.__getitem__)

    def _sharding(self, axes: Axes) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, partition_spec(axes, self.mesh.axis_names))


def _is_on_cpu(leaf: Array) -> bool:
    return next(iter(leaf.devices())).platform == "cpu"


def _untouched(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Zeros that no processor has written: the pages come when they are filled. JAX takes an array with this alignment over
    as it is."""
    size = leaf.dtype.itemsize * math.prod(leaf.shape)
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(leaf.dtype).reshape(leaf.shape)


def _fill_in_place(leaf: Array, is_stacked: bool, tensors: Iterator[np.ndarray]) -> Bool[np.ndarray, " tensors"]:
    """Write tensors to the memory of a leaf on the CPU, which nothing has read yet, and return whether each is finite. JAX
    itself would copy each twice: to an array, and to the stack."""
    memory = (ctypes.c_uint8 * leaf.nbytes).from_address(jax.block_until_ready(leaf).unsafe_buffer_pointer())
    array = np.frombuffer(memory, leaf.dtype).reshape(leaf.shape if is_stacked else (1, *leaf.shape))
    return np.array([_copy(to, tensor) for to, tensor in zip(array, tensors, strict=True)])


def _copy(to: np.ndarray, tensor: np.ndarray) -> bool:
    """Copy a tensor, cast by JAX where its type is another, and return whether all of it is finite: no exponent has all its
    bits, as that of infinity. The integers are compared a chunk at a time, while it is in the processor's cache; as bfloat16
    that would take ten times as long."""
    bits = np.dtype(f"u{to.dtype.itemsize}")
    infinity, largest = np.array(np.inf, to.dtype).view(bits), bits.type(0)
    to, tensor = to.reshape(-1), tensor.reshape(-1)
    for begin in range(0, len(to), CHUNK_VALUES):
        chunk = slice(begin, begin + CHUNK_VALUES)
        to[chunk] = tensor[chunk] if tensor.dtype == to.dtype else _cast(tensor[chunk], to.dtype)
        largest = max(largest, (to[chunk].view(bits) & ~SIGN[bits.itemsize]).max())
    return bool(largest < infinity)


@partial(jax.jit, static_argnums=1)
def _cast(tensor: Array, dtype: np.dtype) -> Array:
    return tensor.astype(dtype)


def _zeros(shapes: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> list[Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in shapes]


@partial(jax.jit, donate_argnums=0)
def _set_whole(leaf: Array, tensor: Array) -> tuple[Array, Bool[Array, " 1"]]:
    """The tensor in the type and the memory of `leaf`, and whether all of it is finite."""
    cast = tensor.astype(leaf.dtype)
    return leaf.at[...].set(cast), jnp.isfinite(cast).all()[None]


@partial(jax.jit, donate_argnums=0)
def _set_layer(
    stack: Array, finite: Bool[Array, " L"], layer: np.int32, tensor: Array
) -> tuple[Array, Bool[Array, " L"]]:
    """Write `tensor` at `layer` of `stack`, and to `finite` whether all of it is."""
    cast = tensor.astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, cast, layer, axis=0)
    return stack, finite.at[layer].set(jnp.isfinite(cast).all())


@partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def _set_quantised(
    stack: QuantArray,
    finite: Bool[Array, " L"],
    layer: np.int32 | None,
    parts: tuple[Array, ...],
    form: WeightForm,
    dtype: np.dtype,
) -> tuple[QuantArray, Bool[Array, " L"]]:
    """Write the codes and scales of a layer, or with None of all; a weight that is not finite has a scale that is not. In
    `dtype` the least code of each scale must be finite, too."""
    found = form.convert(*parts)
    is_finite = jnp.isfinite((found.scales.astype(jnp.float32) * found.layout.offset).astype(dtype)).all()
    if layer is None:
        return jax.tree.map(lambda to, x: to.at[...].set(x.astype(to.dtype)), stack, found), is_finite[None]
    stack = jax.tree.map(
        lambda to, x: jax.lax.dynamic_update_index_in_dim(to, x.astype(to.dtype), layer, axis=0), stack, found
    )
    return stack, finite.at[layer].set(is_finite)
