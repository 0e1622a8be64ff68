"""The layouts in NumPy and float64, element by element: the definition that the rest is tested against."""

from __future__ import annotations

import numpy as np

from pallas_kernels.quantised.quant_array import QuantLayout


def dequantise_np(codes: np.ndarray, scales: np.ndarray, layout: QuantLayout) -> np.ndarray:
    """W [out, in] in float64 from one matrix's codes and scales."""
    out, in_dim = codes.shape[0], codes.shape[1] * 8 // layout.bits
    size, scales = layout.group_size or in_dim, np.asarray(scales, np.float64)
    weight = np.empty((out, in_dim))
    for column in range(in_dim):
        group, place = divmod(column, size)
        if layout.bits == 8:
            code = codes[:, column]
        else:
            byte = codes[:, group * size // 2 + place % (size // 2)]
            code = byte & 15 if place < size // 2 else byte >> 4
        weight[:, column] = scales[:, group] * (code.astype(np.int64) - 2 ** (layout.bits - 1))
    return weight


def scales_np(weight: np.ndarray, layout: QuantLayout, factor: float = 1.0) -> np.ndarray:
    """Scales [out, groups] of a matrix [out, in], before they are rounded to their type."""
    grouped = weight.astype(np.float64).reshape(len(weight), -1, layout.group_size or weight.shape[1])
    return factor * abs(grouped).max(axis=2) / (2 ** (layout.bits - 1) - 1)


def integers_np(weight: np.ndarray, scales: np.ndarray, layout: QuantLayout) -> np.ndarray:
    """Integers [out, in] from −2^(bits−1) to 2^(bits−1) − 1 for given scales; ties go to the even one."""
    steps = np.repeat(np.asarray(scales, np.float64), layout.group_size or weight.shape[1], axis=1)
    quotients = np.divide(weight, steps, out=np.zeros(weight.shape), where=steps != 0)
    return np.round(quotients).clip(-layout.offset, layout.offset - 1).astype(np.int64)


def errors_np(weight: np.ndarray, scales: np.ndarray, layout: QuantLayout) -> np.ndarray:
    """Squared error [out, groups] with given scales."""
    size = layout.group_size or weight.shape[1]
    found = integers_np(weight, scales, layout) * np.repeat(np.asarray(scales, np.float64), size, axis=1)
    return ((found - weight) ** 2).reshape(len(weight), -1, size).sum(axis=2)
