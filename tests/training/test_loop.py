"""Order of the loop of steps: what is dispatched, read, evaluated and saved when."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.layout import ONE_DEVICE
from adafuse_jax.training import loop
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.loop import Progress, Run, run_steps
from adafuse_jax.training.signals import Stopped


class Recorder:
    """A run of steps that compute nothing; `events` are in the order of the calls."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, bad_step: int = 0, start: int = 0, stop_at: int = 0, **settings: Any
    ):
        self.events: list[str] = []
        self.stop_at = stop_at
        config = TrainConfig(model="m", dataset=("d",), output="o", learning_rate=1e-3, **settings)

        def step(state: Any, *_: Any, **__: Any) -> Any:
            number = int(state.step) + 1
            self.events.append(f"dispatch {number}")
            loss = jnp.nan if number == bad_step else 1.0
            return SimpleNamespace(step=number), {"number": number, "loss": jnp.float32(loss), "tokens": 5}

        def read(metrics: dict[str, Any]) -> dict[str, Any]:
            self.events.append(f"read {metrics['number']}")
            return metrics

        monkeypatch.setattr(loop, "train_step", step)
        monkeypatch.setattr(jax, "device_get", read)
        monkeypatch.setattr(Run, "evaluate", lambda _, state, step: self.events.append(f"evaluate {step}"))
        batches = SimpleNamespace(at=self.batch, max_segments=1)
        checkpoints = SimpleNamespace(
            save=lambda state: self.events.append(f"save {state.step}"), wait=lambda: None, before=lambda step: None
        )
        self.run = Run(
            config=config, model=None, data=SimpleNamespace(batches=batches), optimizer=None, phases=None,  # type: ignore[arg-type]
            steps=config.steps or 0, checkpoints=checkpoints,  # type: ignore[arg-type]
            report=SimpleNamespace(step=lambda step, line: None),  # type: ignore[arg-type]
            layout=ONE_DEVICE, max_segments=1, open_output=lambda: self.events.append("open"),
        )  # fmt: skip
        self.start = start

    def batch(self, step: int, _: range) -> None:
        if self.stop_at and step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self) -> list[str]:
        state, seconds = run_steps(self.run, SimpleNamespace(step=self.start))  # type: ignore[arg-type]
        assert state.step == self.run.steps
        assert seconds > 0
        return self.events


def test_the_next_step_is_dispatched_first(monkeypatch: pytest.MonkeyPatch):
    """The first step alone, as its success opens the output; then one step ahead, but not across evaluations and saves."""
    record = Recorder(monkeypatch, steps=6, eval_every=4, checkpoint_every=100)
    assert record() == [
        "evaluate 0", "dispatch 1", "read 1", "open", "dispatch 2", "dispatch 3", "read 2", "dispatch 4", "read 3",
        "read 4", "evaluate 4", "dispatch 5", "dispatch 6", "read 5", "read 6", "evaluate 6", "save 6",
    ]  # fmt: skip


def test_a_resumed_run_opens_at_once(monkeypatch: pytest.MonkeyPatch):
    record = Recorder(monkeypatch, start=3, steps=6, eval_every=100, checkpoint_every=5)
    assert record() == [
        "open", "dispatch 4", "dispatch 5", "read 4", "read 5", "save 5", "dispatch 6", "read 6", "evaluate 6", "save 6",
    ]  # fmt: skip


@pytest.mark.parametrize("bad_step", [2, 3, 4])
def test_no_state_behind_a_bad_loss_is_saved(monkeypatch: pytest.MonkeyPatch, bad_step: int):
    """With the save of step 4 due, and a step dispatched behind the bad one."""
    record = Recorder(monkeypatch, bad_step=bad_step, steps=6, eval_every=100, checkpoint_every=4)
    with pytest.raises(UserError, match=f"^step {bad_step}: loss is not finite; there is no checkpoint yet"):
        record()
    assert not any(event.startswith("save") for event in record.events)


def test_a_signal_stops_at_the_step_that_runs(monkeypatch: pytest.MonkeyPatch):
    """SIGTERM while step 3 runs, when the batch of the one behind it is made."""
    record = Recorder(monkeypatch, stop_at=3, steps=6, eval_every=100, checkpoint_every=100)
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        record()
    assert record.events[-4:] == ["dispatch 3", "read 2", "read 3", "save 3"]


def test_reading_a_step_does_not_wait_for_the_next_one(monkeypatch: pytest.MonkeyPatch):
    """A step of a second is in flight while the metrics and the learning rate of the one before are read."""
    record = Recorder(monkeypatch, steps=6, eval_every=100, checkpoint_every=100)
    monkeypatch.undo()
    progress = Progress(record.run)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 400, lambda _, y: jnp.tanh(y @ x), x))
    matrix = jnp.eye(600)
    jax.block_until_ready(slow(matrix))

    def step(state: Any, *_: Any, **__: Any) -> Any:
        result = matrix if state.step == 0 else slow(matrix)
        return SimpleNamespace(step=state.step + 1, result=result), {"loss": jnp.float32(1), "tokens": 5}

    monkeypatch.setattr(loop, "train_step", step)
    state, first = progress.dispatch(SimpleNamespace(step=0), None, 0)  # type: ignore[arg-type]
    progress.finish(first)  # compiles the schedule
    state, first = progress.dispatch(SimpleNamespace(step=0), None, 1)  # type: ignore[arg-type]
    state, _ = progress.dispatch(state, None, 2)  # type: ignore[arg-type]
    progress.finish(first)
    assert not state.result.is_ready()  # type: ignore[attr-defined]
