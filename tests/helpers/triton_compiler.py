"""Pallas' Triton kernels compiled without a GPU, by the triton package."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import triton
from jax._src.pallas.triton import lowering
from jax.sharding import AbstractDevice, AbstractMesh
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a program can have, by compute capability (CUDA C++ programming guide)."""


@dataclass(frozen=True)
class Kernel:
    """A kernel in Triton's language, and the parameters that it is compiled with."""

    ttir: str
    num_warps: int
    num_stages: int

    def compile(self, capability: int, directory: Path) -> Any:
        """Machine code and everything before it, `asm["ptx"]` among them."""
        path = directory / "kernel.ttir"
        path.write_text(self.ttir)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(str(path), target=GPUTarget("cuda", capability, 32), options=options)


def kernel_of(function: Callable[..., Any], *arguments: Any) -> Kernel:
    """The one kernel that `function` launches for arguments of these shapes."""
    modules: list[str] = []
    lower = lowering.lower_jaxpr_to_triton_module

    def spy(*args: Any, **options: Any) -> Any:
        result = lower(*args, **options)
        modules.append(str(result.module))
        return result

    lowering.lower_jaxpr_to_triton_module = spy
    try:
        mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA A100", 108, "gpu"))
        with jax.sharding.use_abstract_mesh(mesh):
            again = lambda *operands: function(*operands)  # noqa: E731 - JAX lowers one function once
            text = jax.jit(again).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    finally:
        lowering.lower_jaxpr_to_triton_module = lower
    (ttir,) = modules
    num_warps, num_stages = (
        int(n) for name in ("num_warps", "num_stages") for n in re.findall(rf"{name} = (\d+)", text)
    )
    return Kernel(ttir, num_warps, num_stages)
