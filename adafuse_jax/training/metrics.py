"""Metrics of a run: progress bar, metrics.jsonl, trackers, summary, and a plot of loss and expert load."""

from __future__ import annotations

import codecs
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from tqdm import tqdm

from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import new_file, write_text
from adafuse_jax.training.trackers import Tracker

log = logging.getLogger(__name__)


FINITE = ("loss", "balance", "grad_norm")
"""Metrics whose overflow ends a run."""


def not_finite(metrics: dict[str, Any]) -> str | None:
    """The first of FINITE that holds a NaN or an infinite value."""
    return next((name for name in FINITE if name in metrics and not np.isfinite(metrics[name]).all()), None)


def step_line(metrics: dict[str, Any], lr: float, seconds: float) -> dict[str, Any]:
    """The metrics of a step as JSON, rounded, with its learning rate and its speed."""
    tokens = int(metrics["tokens"])
    rounded = {name: np.round(np.asarray(value, np.float64), 6).tolist() for name, value in metrics.items()}
    return {**rounded, "lr": lr, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


def summarize(path: Path, *, steps: int, parameters: int, seconds: float) -> dict[str, Any]:
    """The summary of a run from its metrics file: held-out numbers before and after, and if there were steps their speed."""
    lines, _ = read_metrics(path)
    held_out = [line for line in lines if "eval_loss" in line]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    speed = {
        "median_tokens_per_second": float(np.median(speeds)) if speeds else None,
        "seconds_in_steps": round(seconds, 2),
    }
    return {
        "steps": steps,
        "trainable_parameters": parameters,
        "before": held_out[0] if held_out else None,
        "after": held_out[-1] if held_out else None,
        **(speed if steps else {}),
        "peak_device_gib": runtime.peak_device_gib(),
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
    }


class Report:
    """Metrics of a run, as lines of `metrics.jsonl`, for a tracker, and as a progress bar on stderr (plain lines where it is
    no terminal).

    Nothing is written before `open`. Lines of steps after `start`, left by a killed run, are then dropped: they will be run
    again. Damaged ones are left out, with one line in the log. `mfu_per_token` is the MFU of one token per second, if that
    is known. `open_tracker` gives the tracker, which the caller closes.
    """

    def __init__(
        self,
        path: Path,
        *,
        start: int,
        steps: int,
        log_every: int,
        mfu_per_token: float | None = None,
        open_tracker: Callable[[], Tracker | None] = lambda: None,
    ):
        self.path, self.start, self.steps, self.log_every = path, start, steps, log_every
        self._mfu_per_token, self._open_tracker = mfu_per_token, open_tracker
        self._file: IO[str] | None = None
        self._tracker: Tracker | None = None
        self._unwritten: list[dict[str, Any]] = []
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)

    def open(self) -> None:
        """Write what has been reported so far, and from now on at once. Raises `OSError`."""
        # From step 0 on, all of it will be: also the evaluation before the first step.
        lines, damaged = read_metrics(self.path) if self.start and self.path.is_file() else ([], 0)
        if damaged:
            log.warning("%s: %d damaged line(s) left out", self.path, damaged)
        lines = [line for line in lines if line["step"] <= self.start]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")
        self._tracker = self._open_tracker()
        for line in self._unwritten:
            self._write(line)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        if self._mfu_per_token is not None:
            metrics = {**metrics, "mfu": round(metrics["tokens_per_second"] * self._mfu_per_token, 4)}
        self._bar.update(1)
        shown = {"loss": f"{metrics['loss']:.3f}", "lr": f"{metrics['lr']:.1e}"}
        shown |= {"tok/s": f"{metrics['tokens_per_second']:,.0f}"}
        if "mfu" in metrics:
            shown["mfu"] = f"{metrics['mfu']:.0%}"
        if "load" in metrics:
            shown["load"] = " ".join(f"{share:.0%}" for share in metrics["load"])
        self._bar.set_postfix(shown, refresh=False)
        if step % self.log_every == 0 or step == self.steps:
            self._write({"step": step, **metrics})
        if self._bar.disable and (step % max(1, self.steps // 20) == 0 or step == self.steps):
            print(f"step {step}/{self.steps} " + " ".join(f"{k}={v}" for k, v in shown.items()), file=sys.stderr)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write({"step": step, **metrics})
        self.message(f"step {step}/{self.steps} held out: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def message(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            self._unwritten.append(line)
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(line["step"], line)


class NoReport(Report):
    """The report of a process that is not the first one: nothing."""

    def __init__(self) -> None:
        pass

    def open(self) -> None:
        pass

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics file, and how many were left out: cut short by a kill, damaged, or without a step."""
    lines, damaged = [], 0
    for data in path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"):
        if not data.strip():
            continue
        try:
            line = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            line = None
        if _is_line(line):
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


LISTS = {"load": 1, "pair": 2}
"""Metrics that are lists of numbers, and lists of lists; all others are numbers."""


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    return all(_is_number(value, LISTS.get(name, 0)) for name, value in line.items())


def _is_number(value: Any, depth: int) -> bool:
    """Return whether `value` is a number that numpy reads as a float, or lists of such, nested `depth` deep."""
    if depth:
        return isinstance(value, list) and all(_is_number(inner, depth - 1) for inner in value)
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def plot_training(metrics: Path, picture: Path) -> None:
    """Training and held-out loss (and accuracy) over steps; below, if there are routers, the share of every expert."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines, _ = read_metrics(metrics)
    train = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    scored = [line for line in held_out if "accuracy" in line]
    size = len(train[-1].get("load", ())) if train else 0
    routed = [line for line in train if size and len(line.get("load", ())) == size]
    figure, axes = plt.subplots(1 + bool(routed), 1, figsize=(9, 7), sharex=True, layout="constrained", squeeze=False)
    top, bottom = axes[0, 0], axes[-1, 0]
    steps = [line["step"] for line in train]
    losses = np.array([line["loss"] for line in train])
    top.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8)
    window = max(1, len(losses) // 50)
    if train:
        smooth = np.convolve(np.pad(losses, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
        top.plot(steps, smooth, color="tab:blue", label=f"training loss (mean of {window})")
    right_handles, right_labels = [], []
    if held_out:
        at = [line["step"] for line in held_out]
        top.plot(at, [line["eval_loss"] for line in held_out], "o-", color="tab:orange", label="held-out loss")
        if scored:
            right, at = top.twinx(), [line["step"] for line in scored]
            right.plot(
                at, [100 * line["accuracy"] for line in scored], "s--", color="tab:green", label="held-out accuracy"
            )
            right.set_ylabel("accuracy (%)", color="tab:green")
            right.set_ylim(0, 100)
            right_handles, right_labels = right.get_legend_handles_labels()
    top.set_ylabel("loss (nats per target token)")
    top.set_yscale("log")
    handles, labels = top.get_legend_handles_labels()
    top.legend(
        handles + right_handles, labels + right_labels, loc="upper left", bbox_to_anchor=(1.08, 1), fontsize="small"
    )
    bottom.set_xlabel("step")
    if routed:
        steps, load = [line["step"] for line in routed], np.array([line["load"] for line in routed]).T
        names, colors = [f"expert {e}" for e in range(len(load))], plt.get_cmap("tab20")(range(20))
        bottom.stackplot(steps, 100 * load, labels=names, colors=colors)
        bottom.set_ylabel("share of assignments (%)")
        bottom.set_ylim(0, 100)
        bottom.margins(x=0)
        bottom.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    with new_file(picture, text=False) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
