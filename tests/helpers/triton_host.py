"""Host memory in place of a GPU's for Triton's interpreter, with guards around every array."""

from __future__ import annotations

import numpy as np

GUARD = 4096
TRITON_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}


class HostTensor:
    """Array with the methods of a torch tensor that Triton's interpreter calls; all memory is host memory, so copies
    are the tensor itself."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    untyped_storage = cpu = copy_ = new_empty = set_ = storage_offset = size = stride = lambda self, *_, **__: self


def guarded(array) -> tuple[np.ndarray, np.ndarray]:
    """A copy, and the memory it lies in, which is NaN (or -1) on both sides."""
    array = np.asarray(array)
    memory = np.full(array.size + 2 * GUARD, -1 if array.dtype.kind == "i" else np.nan, array.dtype)
    inside = memory[GUARD:-GUARD].reshape(array.shape)
    inside[...] = array
    return inside, memory
