"""Ceilings of a device, measured in the run that they are compared with: read, copy, and bfloat16 products.

Each is the best of several forms, as no single one is the fastest on every device. A copy counts bytes read and written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.common.timing import time_calls


def measure_ceilings(elements: int, matmul_dim: int, *, seconds: float, repeats: int = 5) -> dict[str, Any]:
    """`read` and `copy` in TB/s over `elements` int32, `matmul` in TFLOP/s for square matrices of `matmul_dim`: each by
    form, and `best_read`, … . `seconds` are those of one repeat."""
    bits = jax.random.bits(jax.random.key(0, impl="rbg"), (elements,), jnp.uint32)
    x = jax.lax.bitcast_convert_type(bits, jnp.int32)
    m = jax.random.normal(jax.random.key(1), (matmul_dim, matmul_dim), jnp.bfloat16) / matmul_dim**0.5
    short, long = min(4096, elements), min(16384, elements)
    reads: dict[str, Callable[[Array], Array]] = {
        "sum": jnp.sum,
        "max": jnp.max,
        "sums of 4096": lambda x: jnp.sum(x.reshape(-1, short), axis=1),
        "sums of 16384": lambda x: jnp.sum(x.reshape(-1, long), axis=1),
        "xor": lambda x: jax.lax.reduce(x, jnp.int32(0), jax.lax.bitwise_xor, (0,)),
    }
    copies: dict[str, Callable[[Array], Array]] = {"copy": jnp.copy, "x + 1": lambda x: x + 1}

    def speed(work: float, call: Callable[[Any], Array], state: Any) -> float:
        """`work` per second, in units of 10¹²."""
        return work / time_calls(call, state, seconds=seconds, repeats=repeats)[0].ms / 1e9

    def read(function: Callable[[Array], Array], _: Any) -> Array:
        return function(x)

    found = {
        "read": {name: speed(x.nbytes, partial(read, jax.jit(f)), None) for name, f in reads.items()},
        "copy": {name: speed(2 * x.nbytes, jax.jit(f), x) for name, f in copies.items()},
        "matmul": {f"{matmul_dim}³": speed(2 * matmul_dim**3, partial(jax.jit(jnp.matmul), m), m)},
    }
    return {
        "array_bytes": x.nbytes,
        **found,
        **{f"best_{kind}": max(speeds.values()) for kind, speeds in found.items()},
    }
