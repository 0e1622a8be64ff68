"""The stopwatch of all benchmarks: wall-clock seconds, and seconds per call of work on a device.

A device runs calls in the order in which they are enqueued. `time_calls` enqueues many without waiting, each with the
state that the last one left, and waits once: seconds per call = (end − begin) / calls, without the cost of a dispatch as
long as a call takes longer than its dispatch. One repeat gives one number; reported are the median of the repeats and, as
noise, the slowest less the fastest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIN_CALLS, MAX_CALLS = 2, 200
"""Calls of a repeat whose length is given in seconds."""


class Stopwatch:
    """Wall-clock time since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds per call of every repeat, and the calls of a repeat."""

    repeats: tuple[float, ...]
    calls: int = 1

    @property
    def ms(self) -> float:
        """Milliseconds per call: the median of the repeats."""
        return 1e3 * statistics.median(self.repeats)

    @property
    def spread_ms(self) -> float:
        """The slowest repeat less the fastest, in milliseconds per call."""
        return 1e3 * (max(self.repeats) - min(self.repeats))

    def __str__(self) -> str:
        return f"{self.ms:.3f} ± {self.spread_ms:.3f} ms"


def wait(state: Any) -> Any:
    """Return `state` once a device has computed its arrays."""
    import jax

    return jax.block_until_ready(state)


def time_calls(
    call: Callable[[Any], Any],
    state: Any,
    *,
    repeats: int,
    calls: int | None = None,
    seconds: float | None = None,
    restart: Callable[[Any], Any] = lambda state: state,
    wait: Callable[[Any], Any] = wait,
    warm_up: bool = True,
) -> tuple[Timing, Any]:
    """Time state = call(state). Returns the times and the last state.

    A repeat has `calls` calls, or as many as fill `seconds`; it begins with `restart(state)`, which is not timed. With
    `warm_up` a repeat comes first that compiles and is not counted. `wait` is for libraries other than JAX.
    """

    def repeat() -> float:
        nonlocal state
        state = wait(restart(state))
        watch = Stopwatch()
        for _ in range(count):
            state = call(state)
        wait(state)
        return watch.seconds / count

    count = calls or MIN_CALLS
    if warm_up:
        repeat()
    if seconds is not None:
        for _ in range(2):  # the first estimate is from two calls only
            count = min(max(round(seconds / repeat()), MIN_CALLS), MAX_CALLS)
    return Timing(repeats=tuple(repeat() for _ in range(repeats)), calls=count), state
