"""The steps of a run, with evaluations and checkpoints between them.

The device does not wait for the host: step s + 1 is dispatched, and the batch of s + 2 made, before the metrics of step s
are read. All metrics are read before an evaluation, a checkpoint and the end, so that no state behind a loss which is not
finite is saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from adafuse_jax.adapters.registry import resolve_forward
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.layout import Layout
from adafuse_jax.parallel.processes import Agreement, wait_for_all
from adafuse_jax.training.checkpoint import Checkpoints
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.data import Data
from adafuse_jax.training.metrics import Report, not_finite, step_line
from adafuse_jax.training.schedules import Phases, learning_rate
from adafuse_jax.training.signals import Stopped, stop_signals
from adafuse_jax.training.step import TrainState, forward, train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that the steps of a run need and do not change."""

    config: TrainConfig
    model: Backbone
    data: Data
    optimizer: optax.GradientTransformation
    phases: Phases
    steps: int
    checkpoints: Checkpoints
    report: Report
    layout: Layout
    max_segments: int
    open_output: Callable[[], None]
    """Called once: after the first step of a run that begins, otherwise at once."""
    forward: Callable[..., Any] = forward
    """See `train_step`."""

    def batch(self, step: int) -> Any:
        """The batch of a step, on its devices if there are several; this process reads its own rows."""
        size = self.config.batch_size
        return self.layout.batch(self.data.batches.at(step, self.layout.rows(size)), size, axis=1)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Dispatch a step; its metrics are on the device."""
        return train_step(
            state, self.model, batch, optimizer=self.optimizer, phases=self.phases, layout=self.layout,
            remat=self.config.remat, unroll=self.config.unroll, max_segments=self.max_segments,
            forward=self.forward,
        )  # fmt: skip

    def evaluate(self, state: TrainState, step: int) -> None:
        backbone, adapter = resolve_forward(state.adapter, self.model)
        result = self.data.held_out.evaluate(backbone, adapter, batch_size=self.config.batch_size, layout=self.layout)
        if result:
            self.report.evaluation(step, result)


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A step that the device may not have finished, and when it was dispatched. Its metrics, learning rate included, are on
    the device."""

    step: int
    metrics: dict[str, Any]
    begun: float


class Progress:
    """Reads the metrics of dispatched steps, in their order, and counts the seconds that the device took for them."""

    def __init__(self, run: Run):
        self.run, self.seconds, self.is_open = run, 0.0, False
        self._rate = jax.jit(learning_rate(run.config, run.steps))
        self._finished = 0.0

    def open(self) -> None:
        """Begin to write, once."""
        if not self.is_open:
            self.run.open_output()
        self.is_open = True

    def dispatch(self, state: TrainState, batch: Any, step: int) -> tuple[TrainState, Dispatched]:
        """Dispatch the step behind `step` others. Its learning rate comes first: behind it, reading it would wait for it."""
        begun, rate = time.perf_counter(), self._rate(step)
        state, metrics = self.run.step(state, batch)
        return state, Dispatched(step + 1, metrics | {"lr": rate}, begun)

    def finish(self, dispatched: Dispatched) -> None:
        """Wait for the step, and report its metrics. Raises `UserError` if they are not finite."""
        metrics = jax.device_get(dispatched.metrics)
        now = time.perf_counter()
        elapsed = now - max(dispatched.begun, self._finished)
        self._finished = now
        self.seconds += elapsed
        _require_finite(dispatched.step, metrics, self.run.checkpoints)
        self.open()
        rate = float(metrics.pop("lr"))
        self.run.report.step(dispatched.step, step_line(metrics, rate, elapsed))


def run_steps(run: Run, state: TrainState) -> tuple[TrainState, float]:
    """All remaining steps. Returns the last state and the seconds spent in steps (evaluation and saving excluded)."""
    config, checkpoints, progress, agreement = run.config, run.checkpoints, Progress(run), Agreement()
    step = int(state.step)
    if step > 0:
        progress.open()
    else:
        run.evaluate(state, step)  # B = 0, so this is the bare backbone, or that with --init-lora
    batch = run.batch(step)
    running: Dispatched | None = None
    with stop_signals() as stop_requested:
        while step < run.steps:
            before = running
            state, running = progress.dispatch(state, batch, step)
            stop = agreement(stop_requested)
            step += 1
            batch = run.batch(step)
            if before is not None:
                progress.finish(before)
            last = step == run.steps
            evaluates, saves = step % config.eval_every == 0 or last, step % config.checkpoint_every == 0 or last
            if progress.is_open and not (evaluates or saves or stop()):
                continue
            progress.finish(running)
            running, number = None, stop()
            if evaluates:
                run.evaluate(state, step)
            if saves or number:
                checkpoints.save(state)
            if number and not last:
                checkpoints.wait()
                wait_for_all()
                raise Stopped(f"stopped at step {step} of {run.steps}, which is saved; continue with --resume", number)
        checkpoints.wait()
    return state, progress.seconds


def _require_finite(step: int, metrics: dict[str, Any], checkpoints: Checkpoints) -> None:
    bad = not_finite(metrics)
    if bad is None:
        return
    checkpoints.wait()
    last = checkpoints.before(step)  # later ones are damaged
    good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    raise UserError(f"step {step}: {bad} is not finite; {good}: lower --learning-rate or look at the data of that step")
