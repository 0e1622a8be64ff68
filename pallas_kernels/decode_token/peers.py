"""Sums over the devices that share a model, inside the kernel.

    y = Σ_d y_d,   y_d = W[:, columns of device d] x[columns of device d]

Every device finds a part of what o and down add to x, and all need the sum. A piece of y is finished by the same block
everywhere, so that block stores its part in the memory of every other device, counts their semaphores up, waits until its
own has been counted up by all, and adds what has arrived. All devices add in the same order, and so keep the same x.

The place of a piece is written again a layer later. By then it has been read: no device gets beyond down of this layer
before all have finished o, nor beyond o of the next before all have finished down.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.plan import HALF, QUERIES
from pallas_kernels.decode_token.tiles import load, store, sum_of

ADDED_UP = "o_proj", "down_proj"


def places(embed_dim: int, columns: int) -> tuple[int, int, int]:
    """(linears, halves of tiles, narrow pieces of their columns) that are added up."""
    return len(ADDED_UP), embed_dim // HALF, columns // QUERIES


class Peers:
    """`received` [linears, devices, halves, pieces, HALF, QUERIES] fp32 is where the others leave their parts; `semaphores`
    [linears · halves · pieces] count them. `axis`: of the mesh."""

    def __init__(self, axis: str, received: Any, semaphores: Any):
        self.received, self.semaphores = received, semaphores
        self.number, self.own = lax.axis_size(axis), lax.axis_index(axis)

    def sum(self, layer, linear: str, half, i, value):
        """Of `value` [HALF, QUERIES] over the devices, in the launch's layer number `layer`."""
        _, _, halves, pieces, *_ = self.received.shape
        which = ADDED_UP.index(linear)
        semaphore = self.semaphores.at[(which * halves + half) * pieces + i]
        for distance in range(1, self.number):
            peer = lax.rem(self.own + distance, self.number)
            store(plgpu.remote_ref(self.received.at[which, self.own, half, i], peer), value)
            plgpu.semaphore_signal(semaphore, 1, device_id=peer)
        plgpu.semaphore_wait(semaphore, (self.number - 1) * (layer + 1), decrement=False)
        parts = (jnp.where(self.own == d, value, load(self.received.at[which, d, half, i])) for d in range(self.number))
        return sum_of(parts)
