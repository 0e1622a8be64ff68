"""Compilation of programs ahead of their first call, by threads, while the weights they read are still being loaded.

    with compiled_ahead(slots.compile):    # calls of `Program`s are traced, and return the shapes of their results
        model = loading.result()           # the programs are being compiled
    engine.generate(…)                     # they are compiled

Tracing holds the interpreter's lock, compilation does not: several programs compile while the next one is traced.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, update_wrapper
from typing import Any

import jax

from adafuse_jax.core.errors import UserError, shortened

log = logging.getLogger(__name__)

MAX_THREADS = max(4, (os.cpu_count() or 1) // 2)
"""Programs that are compiled at a time, at most; XLA has threads of its own for each."""


class Program:
    """A jitted function, which a call inside `compiled_ahead` does not run. The other attributes are `jax.jit`'s."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._jitted = jax.jit(function, **options)
        update_wrapper(self, function.func if isinstance(function, partial) else function)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        ahead = _current.get()
        if ahead is None:
            return self._jitted(*arguments, **named)
        return ahead.trace(self._jitted, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


class _Ahead:
    """Programs that are being compiled."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(MAX_THREADS, "compile")
        self._compiling: list[Future] = []

    def trace(self, jitted: Any, *arguments: Any, **named: Any) -> Any:
        """Give a call to the threads; JAX keeps what they compile for later calls of this signature."""
        lowered = jitted.lower(*arguments, **named)
        self._compiling.append(self.threads.submit(lowered.compile))
        return lowered.out_info

    def wait(self) -> None:
        wait(self._compiling)
        for error in (one.exception() for one in self._compiling):
            if error is not None:
                _log_error(error)


_current: ContextVar[_Ahead | None] = ContextVar("ahead", default=None)


@contextmanager
def compiled_ahead(call: Callable[[], object] | None) -> Iterator[None]:
    """Run `call`, whose calls of `Program`s are compiled by threads instead of run, then the body of the context; leave it
    when all are compiled. One that fails is compiled by its first call, which reports the error."""
    ahead = _Ahead()
    try:
        if call is not None:
            _trace(call, ahead)
        yield
        ahead.wait()
    finally:
        ahead.threads.shutdown(wait=False, cancel_futures=True)


def _trace(call: Callable[[], object], ahead: _Ahead) -> None:
    token = _current.set(ahead)
    try:
        call()
    except (RuntimeError, UserError) as error:
        _log_error(error)
    finally:
        _current.reset(token)


def _log_error(error: BaseException) -> None:
    log.info("a program is compiled when it is needed, not ahead: %s", shortened(str(error), 200))
