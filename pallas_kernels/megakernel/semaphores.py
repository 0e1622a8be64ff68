"""The semaphores of a group of linears, where partial sums are not polled: one for A x, one for h, and one for each CTA
group's partial sums.

They are never reset in a launch: a wait counts the signals of this layer and of all layers that ran before it.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.megakernel.all_reduce import AllReduce
from pallas_kernels.megakernel.plan import Group
from pallas_kernels.megakernel.schedule import TileSchedule

A_X, H, FIRST_CTA_GROUP = 0, 1, 2


class GroupSemaphores:
    """`refs`: of the whole launch, or None where CTAs do not run at the same time. `all_reduce`: the devices whose partial
    sums are waited for, too, or None."""

    def __init__(self, refs: Any, group: Group, schedule: TileSchedule, all_reduce: AllReduce | None):
        self.refs, self.group, self.schedule, self.all_reduce = refs, group, schedule, all_reduce

    def _signal(self, number):
        if self.refs is not None:
            plgpu.semaphore_signal(self.refs.at[self.group.first_semaphore + number], 1, memory_scope="gpu")

    def _wait(self, number, signals, layer):
        if self.refs is not None:
            semaphore = self.refs.at[self.group.first_semaphore + number]
            plgpu.semaphore_wait(semaphore, signals * (layer + 1), decrement=False, memory_scope="gpu")

    def signal_a_x(self):
        """Signal that this CTA's partial sums of A x are stored."""
        self._signal(A_X)

    def wait_a_x(self, layer):
        """Wait until the partial sums of A x of all CTAs are stored."""
        self._wait(A_X, self.schedule.num_a_ctas(), layer)

    def signal_h(self):
        """Signal that this CTA's tiles of h are stored."""
        self._signal(H)

    def wait_h(self, layer, reducers):
        """Wait until the tiles of h of all `reducers` are stored."""
        self._wait(H, reducers, layer)

    def signal_units(self):
        """Signal that this CTA's partial sums of its units are stored."""
        number = FIRST_CTA_GROUP + self.schedule.cta_group
        if self.all_reduce is None:
            self._signal(number)
        else:
            self.all_reduce.signal(self.refs.at[self.group.first_semaphore + number])

    def wait_units(self, layer):
        """Wait until the partial sums of all slices are stored, on all devices."""
        number, split_k = FIRST_CTA_GROUP + self.schedule.cta_group, self.group.split_k
        if self.all_reduce is None:
            self._wait(number, split_k, layer)
        else:
            signals = self.all_reduce.num_devices * split_k * (layer + 1)
            self.all_reduce.wait(self.refs.at[self.group.first_semaphore + number], signals)
