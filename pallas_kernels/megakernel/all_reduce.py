"""All-reduce of o_proj's and down_proj's outputs over the devices that share a model, inside the kernel.

    y = Σ_d Σ_s y_partial[d, s],   y_partial[d, s] = W[:, slice s of device d's columns] x[the same slice]

A CTA stores its partial sum of such a tile on every device, and signals the semaphore of its CTA group on every device;
the CTA that finishes the tile on a device waits for all partials and adds them in the same order, so all devices hold the
same x. The logits of a device's tokens go to every device, too.

The place of a partial is written again a layer later. By then it has been read: no device gets beyond down of this layer
before all have finished o, nor beyond o of the next before all have finished down.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.register_tiles import store


class AllReduce:
    """The devices of a mesh's `axis`. `done`: a semaphore, which all CTAs of the other devices signal in the end."""

    def __init__(self, axis: str, done: Any):
        self.num_devices, self.device, self.done = lax.axis_size(axis), lax.axis_index(axis), done

    @property
    def others(self) -> list[Any]:
        return [lax.rem(self.device + distance, self.num_devices) for distance in range(1, self.num_devices)]

    def store(self, ref, value):
        """Store `value` at `ref` on this device and on every other one."""
        store(ref, value)
        for device in self.others:
            store(plgpu.remote_ref(ref, device), value)

    def signal(self, semaphore):
        """Signal a semaphore on this device and on every other one, after all earlier stores have become visible."""
        for device in self.others:
            plgpu.semaphore_signal(semaphore, 1, device_id=device)
        plgpu.semaphore_signal(semaphore, 1)

    def wait(self, semaphore, signals):
        """Wait until the semaphore has had `signals` signals in this launch."""
        plgpu.semaphore_wait(semaphore, signals, decrement=False)

    def wait_for_all(self, num_ctas: int):
        """Wait until all CTAs of the other devices have finished their stores to this device."""
        for device in self.others:
            plgpu.semaphore_signal(self.done, 1, device_id=device)
        self.wait(self.done, num_ctas * (self.num_devices - 1))
