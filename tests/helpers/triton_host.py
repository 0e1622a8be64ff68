"""Triton without a GPU: guarded host memory for its interpreter, and kernels that are only compiled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
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


def compiler_of(capability: int, compiled: list[Any]) -> SimpleNamespace:
    """Stand-in for the module `jax_triton`, whose calls compile their kernel for GPUs of a compute capability, add it to
    `compiled` and give zeros."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def triton_call(
        *args, kernel, out_shape, grid, name, num_warps, num_stages, zeroed_outputs=None, input_output_aliases=None,
        **constants,
    ):  # fmt: skip
        types = [TRITON_TYPES[x.dtype.name] for x in (*args, *out_shape)]
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled.append(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    return SimpleNamespace(triton_call=triton_call)
