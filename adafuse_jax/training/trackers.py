"""Metrics of a run for other programs, beside metrics.jsonl: TensorBoard event files, or a run of Weights & Biases.

Names are those of metrics.jsonl; of `load`, a number an expert, `load/0`, `load/1`, …. `pair` is in metrics.jsonl only.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from adafuse_jax.core.errors import UserError, shortened

log = logging.getLogger(__name__)

TrackerName = Literal["none", "tensorboard", "wandb"]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
PROJECT = "adafuse-jax"
WANDB_ID_FILE = "run-id.txt"
FLUSH_SECONDS = 10
OFFLINE = ("offline", "dryrun")
FINISH_SECONDS = "240"
"""Time at the end for an upload to W&B; `wandb sync` uploads what is left. Other processes wait 300 s for the first."""


class Tracker(Protocol):
    """A place that takes the metrics of steps."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers and lists of numbers by name."""

    def close(self) -> None:
        """Return when all is written."""


def require_tracker(name: TrackerName, output: Path) -> None:
    """Raise UserError if the package of the tracker, or its settings, cannot be used. Nothing is written."""
    try:
        if name == "tensorboard":
            import tensorboardX  # noqa: F401
        elif name == "wandb":
            wandb = _import_wandb(output)
    except Exception as error:  # a broken installation raises anything
        raise UserError(
            f"--report-to {name}: the package {PACKAGES[name]} cannot be imported ({shortened(str(error), 120)}); "
            f"pip install 'adafuse-jax[{name}]'"
        ) from error
    if name == "wandb":
        _require_settings(wandb)


def _import_wandb(output: Path) -> Any:
    """The package wandb, with defaults in the environment, where its own process reads them too."""
    mode = os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
    if mode in OFFLINE:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for kind in ("cache", "data"):
            os.environ.setdefault(f"WANDB_{kind.upper()}_DIR", str(output.resolve() / "wandb" / kind))
    import wandb

    return wandb


def _require_settings(wandb: Any) -> None:
    """Raise UserError if a variable of the environment is no setting of W&B, or if an online run has no credentials."""
    from pydantic import ValidationError  # wandb has it

    settings = wandb.Settings()
    for variable, value in os.environ.items():
        try:
            settings.update_from_env_vars({variable: value})
        except (ValueError, wandb.Error) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UserError(
                f"--report-to wandb: {variable}: {shortened(reason, 250)}; correct or unset this variable"
            ) from error
    if settings.mode in OFFLINE or settings.mode == "disabled":
        return
    try:
        fault = "" if wandb.login(prompt=False, verify=False) else "no API key"
    except wandb.Error as error:
        fault = shortened(str(error), 200)
    if fault:
        raise UserError(
            f"--report-to wandb: WANDB_MODE={settings.mode}: {fault}; log in with `wandb login`, or set WANDB_MODE=offline"
        )


def open_tracker(name: TrackerName, output: Path, *, start: int, settings: Mapping[str, Any]) -> Tracker | None:
    """The tracker of the run in `output`, which goes on with its record behind step `start`; None for "none"."""
    if name == "none":
        return None
    return Tolerated(
        name, lambda: TensorBoard(output, start) if name == "tensorboard" else WeightsAndBiases(output, settings)
    )


class Tolerated:
    """A tracker that gets nothing more after its first failure, of which one warning tells: the run goes on."""

    def __init__(self, name: TrackerName, opened: Callable[[], Tracker]):
        self._name = name
        self._tracker: Tracker | None = None
        self._failed = False
        with self._tolerated():
            self._tracker = opened()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._tracker is not None and not self._failed:
            with self._tolerated():
                self._tracker.log(step, metrics)

    def close(self) -> None:
        if self._tracker is not None:
            with self._tolerated():
                self._tracker.close()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._failed:
                why = shortened(str(error) or type(error).__name__, 200)
                log.warning("--report-to %s failed (%s): metrics.jsonl alone has all metrics", self._name, why)
            self._failed = True


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by name."""
    for name, value in metrics.items():
        if name == "load":
            yield from ((f"load/{expert}", share) for expert, share in enumerate(value))
        elif name not in ("pair", "step"):
            yield name, value


class TensorBoard:
    """Event files in OUTPUT/tensorboard. Events of steps behind `start`, left by a killed run, are marked as void.

    They are written here: the thread of tensorboardX's SummaryWriter ends at an error of the disk, and its callers then
    wait for ever.
    """

    def __init__(self, output: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = output / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{start}")  # two files of one second would have one name
        self._flushed = 0.0
        void = start + 1 if start else 0
        self._write(Event(step=void, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(metrics)]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        if event.wall_time - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = event.wall_time


class WeightsAndBiases:
    """A run in OUTPUT/wandb, offline unless WANDB_MODE is set. Its id is kept there: a resumed run has the same."""

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        wandb = _import_wandb(output)
        folder = output / "wandb"
        folder.mkdir(exist_ok=True)
        kept = folder / WANDB_ID_FILE
        if not kept.exists():
            kept.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            name=output.resolve().name, id=kept.read_text().strip(), dir=str(output), config=dict(settings),
            resume=None if os.environ["WANDB_MODE"] in OFFLINE else "allow",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, finish_timeout_raises=True
            ),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(scalars(metrics))})

    def close(self) -> None:
        import wandb

        try:
            self._run.finish()
        finally:
            wandb.teardown()  # at the exit, it would print a traceback if wandb's process is dead
