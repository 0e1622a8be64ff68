"""Sums over the devices that share a model, inside the kernel.

    y = Σ_d Σ_s y_part[d, s],   y_part[d, s] = W[:, slice s of device d's columns] x[the same slice]

Every device finds a part of what o and down add to x, and all need the sum. So a block stores its part of such a product on
every device, and counts the semaphore of its member up on every device; who finishes there waits for all parts and adds them
in the same order, and so all keep the same x. The logits of a device's tokens go to every device, too.

The place of a part is written again a layer later. By then it has been read: no device gets beyond down of this layer
before all have finished o, nor beyond o of the next before all have finished down.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_token.tiles import store


class Peers:
    """The devices of a mesh's `axis`. `done`: a semaphore, which all blocks of the others count up in the end."""

    def __init__(self, axis: str, done: Any):
        self.number, self.own, self.done = lax.axis_size(axis), lax.axis_index(axis), done

    @property
    def others(self) -> list[Any]:
        return [lax.rem(self.own + distance, self.number) for distance in range(1, self.number)]

    def store(self, ref, value):
        """Here, and at the same place of every other device."""
        store(ref, value)
        for device in self.others:
            store(plgpu.remote_ref(ref, device), value)

    def signal(self, semaphore):
        """Here and everywhere else, when what was stored before is there."""
        for device in self.others:
            plgpu.semaphore_signal(semaphore, 1, device_id=device)
        plgpu.semaphore_signal(semaphore, 1)

    def wait(self, semaphore, signals):
        """Until it has been counted up so often in this launch."""
        plgpu.semaphore_wait(semaphore, signals, decrement=False)

    def wait_for_all(self, blocks: int):
        """Until all blocks of the other devices have stored what they had to store here."""
        for device in self.others:
            plgpu.semaphore_signal(self.done, 1, device_id=device)
        self.wait(self.done, blocks * (self.number - 1))
