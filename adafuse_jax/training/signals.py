"""SIGTERM and Ctrl-C as a request to save and stop at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the state is saved. The second argument is the signal's number."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Context in which SIGTERM and the first Ctrl-C only set the number that the yielded function returns (else 0). After
    one of them Ctrl-C has its outer effect: it ends a process in which `run_cli` runs, and else is a `KeyboardInterrupt`."""
    requested = 0

    def handler(signum: int, frame: Any) -> None:
        nonlocal requested
        requested = requested or signum
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: requested
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
