"""Time of a step by kind of kernel, from JAX's profiler.

kind         kernels whose name has one of
attention    fmha, flash, attention, sdpa, cudnn
products     gemm, cutlass, nvjet, xmma, dot, matmul, grouped
copies       copy, transpose, slice, concatenate, memcpy, memset
other        everything else: norms, rotations, activations, sums, the optimiser
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("fmha", "flash", "attention", "sdpa", "cudnn"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "dot", "matmul", "grouped"),
    "copies": ("copy", "transpose", "slice", "concatenate", "memcpy", "memset"),
}


def kind_of(kernel: str) -> str:
    """Kind of a kernel, by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(run: Callable[[], Any], steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds a step by kind of kernel, and of the longest kernels, while `run` makes `steps` steps."""
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            jax.block_until_ready(run())
        times: Counter[str] = Counter()
        for path in Path(scratch).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            times[event.name] += event.duration_ns / 1e6 / steps
    kinds: Counter[str] = Counter()
    for name, ms in times.items():
        kinds[kind_of(name)] += ms
    return dict(kinds.most_common()), dict(times.most_common(40))
