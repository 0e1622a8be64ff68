"""Ceilings of a device, measured in the run that they are compared with: read, copy, and bfloat16 products.

Each is the best of several forms, as no single one is the fastest on every device. A copy counts bytes read and written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.common.timing import time_calls

REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Speed by form: `read` and `copy` in TB/s over an array of `array_bytes`, `matmul` in TFLOP/s."""

    array_bytes: int
    read: dict[str, float]
    copy: dict[str, float]
    matmul: dict[str, float]

    @property
    def best_read(self) -> float:
        return max(self.read.values())

    @property
    def best_copy(self) -> float:
        return max(self.copy.values())

    @property
    def best_matmul(self) -> float:
        return max(self.matmul.values())


def measure_ceilings(elements: int, matmul_dim: int, *, seconds: float, repeats: int = REPEATS) -> Ceilings:
    """Over `elements` int32 and square matrices of `matmul_dim`; `seconds` are those of one repeat."""
    bits = jax.random.bits(jax.random.key(0, impl="rbg"), (elements,), jnp.uint32)
    x = jax.lax.bitcast_convert_type(bits, jnp.int32)
    m = jax.random.normal(jax.random.key(1), (matmul_dim, matmul_dim), jnp.bfloat16) / matmul_dim**0.5
    row = min(4096, elements)
    reads: dict[str, Callable[[Array], Array]] = {
        "sum": jnp.sum,
        "max": jnp.max,
        "sums of 4096": lambda x: jnp.sum(x.reshape(-1, row), axis=1),
        "sums of 16384": lambda x: jnp.sum(x.reshape(-1, min(4 * row, elements)), axis=1),
        "xor": lambda x: jax.lax.reduce(x, jnp.int32(0), jax.lax.bitwise_xor, (0,)),
    }
    copies: dict[str, Callable[[Array], Array]] = {"copy": jnp.copy, "x + 1": lambda x: x + 1}

    def speed(work: float, call: Callable[[Any], Array], state: Any) -> float:
        """`work` per second, in units of 10¹²."""
        return work / time_calls(call, state, seconds=seconds, repeats=repeats)[0].ms / 1e9

    def read(function: Callable[[Array], Array], _: Any) -> Array:
        return function(x)

    return Ceilings(
        array_bytes=x.nbytes,
        read={name: speed(x.nbytes, partial(read, jax.jit(f)), None) for name, f in reads.items()},
        copy={name: speed(2 * x.nbytes, jax.jit(f), x) for name, f in copies.items()},
        matmul={f"{matmul_dim}³": speed(2 * matmul_dim**3, partial(jax.jit(jnp.matmul), m), m)},
    )
