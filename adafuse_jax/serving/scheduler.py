"""The scheduler: one thread that owns the engine's slots, and nothing else touches them.

    event loop ── submit, cancel, call ──► commands ──► insert ─► step ─► hand over ─► evict ──► call_soon_threadsafe

Rows are served first come, first served: a waiting row takes the first slot that is free. A cancelled row leaves its slot
before the next step. The tokens of a step cross to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.slots import Slots
from adafuse_jax.serving.errors import queue_full
from adafuse_jax.serving.metrics import Metrics
from adafuse_jax.serving.work import Begun, Event, Failed, Token, Work

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Steps that fail in a row before the server gives up: the device or the program is broken."""
NOT_FINITE = "the logits are not finite: the weights of the model or adapter hold NaN or overflow"
STEP_FAILED = Failed(500, "a decoding step failed; the log of the server says why")


class Scheduler:
    """Rows of all requests over `slots`.

    Args:
      slots: makes the slots, again after a step that failed.
      max_queue: rows that may wait while all slots are taken.
      warm_up: called with the first slots.
      on_end: called in the event loop when the thread has ended; its argument says whether it gave up.
    """

    def __init__(
        self,
        slots: Callable[[], Slots],
        *,
        max_queue: int,
        metrics: Metrics,
        on_end: Callable[[bool], None],
        warm_up: Callable[[Slots], None] = lambda slots: None,
    ):
        self._make_slots, self._slots = slots, slots()
        warm_up(self._slots)
        self._places = self._slots.num_slots + max_queue
        self._max_queue, self._metrics, self._on_end = max_queue, metrics, on_end
        self._wakes = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._open = 0  # rows submitted and not over; changed under the condition's lock
        self._waiting: deque[Work] = deque()
        self._running: dict[int, Work] = {}
        self._handed: list[tuple[Work, Event]] = []
        self._is_stopping = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # Called in the event loop's thread

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def submit(self, works: Sequence[Work]) -> None:
        """Queue the rows of a request, all or none. Raises `APIError` 429 where the queue has no room for them."""
        with self._wakes:
            if self._open + len(works) > self._places:
                self._metrics.refused.inc()
                raise queue_full(self._max_queue)
            self._open += len(works)
            self._commands.append(lambda: self._waiting.extend(works))
            self._wakes.notify()

    def cancel(self, works: Sequence[Work]) -> None:
        """Free the slots of rows whose answers nobody reads any more, before the next step."""

        def cancel() -> None:
            for work in works:
                if not work.is_over:
                    self._end(work, "cancelled")

        self._command(cancel)

    def call[Result](self, function: Callable[[], Result]) -> asyncio.Future[Result]:
        """Run a function between two steps, such as the loading of an adapter."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._command(run)
        return asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the rows that are left, then the thread."""

        def stop() -> None:
            self._is_stopping = True

        self._command(stop)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _command(self, command: Callable[[], Any]) -> None:
        with self._wakes:
            self._commands.append(command)
            self._wakes.notify()

    # The thread

    def _run(self) -> None:
        try:
            while not self._is_stopping and self._failures < MAX_FAILURES:
                self._wait_for_commands()
                try:
                    self._obey()
                    self._fill()
                    self._step()
                except Exception as error:
                    self._fail(error)
                self._metrics.rows(len(self._running), len(self._waiting))
                self._hand_over()
        finally:
            for work in [*self._running.values(), *self._waiting]:
                self._hand(work, Failed(503, "the server stops; try again later"))
            self._hand_over()
            self._in_loop(self._on_end, not self._is_stopping)

    def _wait_for_commands(self) -> None:
        """Wait while there is nothing to do."""
        with self._wakes:
            while not (self._waiting or self._running or self._commands):
                self._wakes.wait()

    def _obey(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _fill(self) -> None:
        """Put waiting rows into free slots."""
        while self._waiting and self._slots.free:
            work = self._waiting.popleft()
            if not work.model.is_loaded:  # another one may have its name by now
                self._end(work, "failed", Failed(404, f"the adapter {work.model.name} has been unloaded"))
                continue
            try:
                work.slot = self._slots.insert(
                    work.prompt, max_new_tokens=work.max_new_tokens, adapter=work.model.adapter, sampling=work.sampling,
                    seed=work.seed, sample=work.sample, stop_ids=work.stop_ids, reuse_cache=True,
                    logprobs=work.logprobs, prompt_logprobs=work.prompt_logprobs,
                )  # fmt: skip
            except Exception:
                self._end(work, "failed", STEP_FAILED)
                raise
            self._running[work.slot] = work

    def _step(self) -> None:
        step = self._slots.step() if self._running else None
        if step is None:
            if self._running:
                raise RuntimeError("the slots have no step for rows that run")
            return
        self._failures = 0
        now = time.perf_counter()
        for slot, row in step.rows.items():
            work = self._running.get(slot)
            if work is None:
                continue
            if row.finish_reason == "not_finite":
                self._end(work, "failed", Failed(500, NOT_FINITE))
                continue
            if not work.read:
                logprobs = row.prompt_logprobs if work.prompt_logprobs is not None else None
                self._hand(work, Begun(cached=row.cached, prompt_logprobs=logprobs))
            self._hand(work, token_of(row))
            self._metrics.token(work, row, now)
            work.read, work.last = work.read + 1, now
            if row.finish_reason is not None:
                self._end(work, row.finish_reason)

    def _end(self, work: Work, outcome: str, event: Event | None = None) -> None:
        work.is_over = True
        if event is not None:
            self._hand(work, event)
        self._over(work, outcome)
        if work.slot is not None:
            del self._running[work.slot]
            self._slots.evict(work.slot)
        elif work in self._waiting:
            self._waiting.remove(work)

    def _over(self, work: Work, outcome: str) -> None:
        with self._wakes:
            self._open -= 1
        self._metrics.ended(work, outcome)

    def _fail(self, error: Exception) -> None:
        """A step failed and took the rows with it: they end, and other slots take their place."""
        self._failures += 1
        log.error("a step failed, and %d rows with it: %s: %s", len(self._running), type(error).__name__, error)
        for work in self._running.values():
            work.is_over = True
            self._hand(work, STEP_FAILED)
            self._over(work, "failed")
        self._running.clear()
        self._slots.close()
        del self._slots  # its cache, before another one is made
        self._slots = self._make_slots()

    def _hand_over(self) -> None:
        if self._handed:
            handed, self._handed = self._handed, []
            self._in_loop(_put, handed)

    def _hand(self, work: Work, event: Event) -> None:
        self._handed.append((work, event))

    def _in_loop(self, function: Callable[..., None], argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # it is closed: the server did not wait any longer
            self._is_stopping = True


def _put(handed: list[tuple[Work, Event]]) -> None:
    for work, event in handed:
        work.events.put_nowait((work.index, event))


def token_of(row: Row) -> Token:
    """The row's newest token."""
    ended_by_token = row.finish_reason == "stop"
    experts = None
    if len(row.seconds) > 1 and row.experts:
        experts = [*zip(row.experts[-1].ravel().tolist(), row.gates[-1].ravel().tolist(), strict=True)]
    return Token(
        id=None if ended_by_token else row.token_ids[-1],
        finish_reason=row.finish_reason if row.finish_reason in ("stop", "length") else None,
        logprobs=row.logprobs[-1] if row.logprobs and not ended_by_token else None,
        experts=experts,
    )
