"""Forms in which files hold the weight [out, in] of a linear that becomes a `QuantArray`: the tensors of each, and their
conversion on the device, a layer at a time.

    form           tensors of a linear (shape)
    Dense          weight [out, in], which is quantised
    PackQuantized  weight_packed [out, in·bits/32], weight_scale [out, groups], weight_shape [2]      compressed-tensors
    GPTQ           qweight [in·bits/32, out], scales [groups, out], qzeros [groups, out·bits/32], g_idx [in], if there

Packed are words of 32 bits, the first code in the lowest; codes and scales are taken over as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.parallel.axes import Axes
from pallas_kernels.quantised import QuantArray, QuantLayout, quantise

WORD_BITS = 32
FLOAT = "a float"
"""In the place of a type's name in the file: any that `require_float` takes."""

Read = Callable[[str], np.ndarray]


class WeightForm(Protocol):
    """A form; as a hashable value, a static argument of the program that converts."""

    @property
    def layout(self) -> QuantLayout:
        """Layout of the `QuantArray`."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that make it, by the end of their names, where a plain weight has `weight`."""

    def tensors(self, out: int, into: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """The end of each tensor's name → its shape, and its type's name in the file."""

    def axes(self, axes: Axes) -> tuple[Axes, ...]:
        """Logical axes of `parts`, from those of W [out, in]."""

    def of_rows(self, parts: Sequence[np.ndarray], rows: slice) -> tuple[np.ndarray, ...]:
        """The parts of some outputs, where one tensor holds several linears."""

    def convert(self, *parts: Array) -> QuantArray:
        """Codes and scales of one layer."""

    def check(self, read: Read, where: str, ends: set[str], shape: tuple[int, ...]) -> None:
        """Raise `UserError` for values by which this is another scheme, or no weight of `shape`, [out, in]. `read` gives the
        tensor of an end, of which the file has `ends`."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Weights that are quantised while they are loaded."""

    layout: QuantLayout
    scale_dtype: Any
    parts: tuple[str, ...] = ("weight",)

    def tensors(self, out: int, into: int) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"weight": ((out, into), FLOAT)}

    def axes(self, axes: Axes) -> tuple[Axes, ...]:
        return (axes,)

    def of_rows(self, parts: Sequence[np.ndarray], rows: slice) -> tuple[np.ndarray, ...]:
        return tuple(part[rows] for part in parts)

    def convert(self, *parts: Array) -> QuantArray:
        return quantise(parts[0], self.layout, self.scale_dtype)

    def check(self, read: Read, where: str, ends: set[str], shape: tuple[int, ...]) -> None:
        return


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """The format `pack-quantized` of compressed-tensors, symmetric."""

    layout: QuantLayout
    parts: tuple[str, ...] = ("weight_packed", "weight_scale")

    def tensors(self, out: int, into: int) -> dict[str, tuple[tuple[int, ...], str]]:
        words = into * self.layout.bits // WORD_BITS
        return {
            "weight_packed": ((out, words), "I32"),
            "weight_scale": ((out, self.layout.groups(into)), FLOAT),
            "weight_shape": ((2,), "I64"),
        }

    def axes(self, axes: Axes) -> tuple[Axes, ...]:
        return axes, axes if self.layout.group_size else axes[:1]

    def of_rows(self, parts: Sequence[np.ndarray], rows: slice) -> tuple[np.ndarray, ...]:
        return tuple(part[rows] for part in parts)

    def convert(self, *parts: Array) -> QuantArray:
        return _from_words(parts[0], parts[1], self.layout)

    def check(self, read: Read, where: str, ends: set[str], shape: tuple[int, ...]) -> None:
        if "weight_g_idx" in ends:
            raise UserError(act_order(f"{where}.weight_g_idx"))
        if "weight_zero_point" in ends:
            raise UserError(asymmetric(f"{where}.weight_zero_point"))
        if (found := read("weight_shape").tolist()) != list(shape):
            raise UserError(
                f"{where}.weight_shape is {quoted(found)}, config.json says {list(shape)}; one of them is wrong"
            )


@dataclass(frozen=True, slots=True)
class GPTQ:
    """The format of AutoGPTQ and GPTQModel, symmetric and without act-order. `zero`: the zero point as it is stored, one
    less than the code of 0 in the first version of the format."""

    layout: QuantLayout
    zero: int
    parts: tuple[str, ...] = ("qweight", "scales")

    def tensors(self, out: int, into: int) -> dict[str, tuple[tuple[int, ...], str]]:
        bits, groups = self.layout.bits, self.layout.groups(into)
        return {
            "qweight": ((into * bits // WORD_BITS, out), "I32"),
            "scales": ((groups, out), FLOAT),
            "qzeros": ((groups, out * bits // WORD_BITS), "I32"),
        }

    def axes(self, axes: Axes) -> tuple[Axes, ...]:
        return axes[::-1], axes[::-1] if self.layout.group_size else (None, axes[0])

    def of_rows(self, parts: Sequence[np.ndarray], rows: slice) -> tuple[np.ndarray, ...]:
        return tuple(part[:, rows] for part in parts)

    def convert(self, *parts: Array) -> QuantArray:
        return _from_words(parts[0].T, parts[1].T, self.layout)

    def check(self, read: Read, where: str, ends: set[str], shape: tuple[int, ...]) -> None:
        columns = np.arange(shape[1]) // (self.layout.group_size or shape[1])
        if "g_idx" in ends and (read("g_idx") != columns).any():
            raise UserError(act_order(f"{where}.g_idx"))
        bits = self.layout.bits
        word = sum(self.zero << at for at in range(0, WORD_BITS, bits))
        if (read("qzeros").view(np.uint32) != word).any():
            raise UserError(asymmetric(f"{where}.qzeros"))


def act_order(where: str) -> str:
    """The message of a checkpoint whose columns are in groups by their importance."""
    return (
        f"{where}: act-order: the columns of a group are spread over the row, and x would have to be gathered before each "
        "product; give a checkpoint without act-order (desc_act, actorder: group), or the unquantised model with --quantize"
    )


def asymmetric(where: str) -> str:
    """The message of a checkpoint with zero points."""
    return f"{where}: zero points: give a symmetric checkpoint, or the unquantised model with --quantize"


def _from_words(words: Int32[Array, "out words"], scales: Array, layout: QuantLayout) -> QuantArray:
    data = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(len(words), -1)  # the lowest byte first
    if layout.bits == 4:
        data = jnp.stack([data & 15, data >> 4], axis=-1).reshape(len(words), -1)
    return QuantArray(layout.pack(data), scales, layout)


def to_words(codes: UInt8[Array, "*rows bytes"], layout: QuantLayout) -> Int32[Array, "*rows words"]:
    """Codes of a `QuantArray` → the words of `PackQuantized`."""
    data = layout.unpack(codes)
    if layout.bits == 4:
        pairs = data.reshape(*data.shape[:-1], -1, 2)
        data = pairs[..., 0] | pairs[..., 1] << 4
    return jax.lax.bitcast_convert_type(data.reshape(*data.shape[:-1], -1, 4), jnp.int32)
