"""What a run says: a progress bar, metrics.jsonl, and a picture of loss and expert load at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adafuse_jax.core.atomic_files import new_file, write_text


class Report:
    """Metrics of a run, as lines of `metrics.jsonl` and as a progress bar on stderr (plain lines where it is no terminal).

    Lines of steps after `start`, left by a killed run, are dropped: they will be run again.
    """

    def __init__(self, path: Path, *, start: int, steps: int, log_every: int):
        self.path, self.steps, self.log_every = path, steps, log_every
        # From step 0 on, all of it will be: also the evaluation before the first step.
        kept = [line for line in read_metrics(path) if line["step"] <= start] if start and path.exists() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        self._bar.update(1)
        shown = {"loss": f"{metrics['loss']:.3f}", "lr": f"{metrics['lr']:.1e}"}
        shown |= {"tok/s": f"{metrics['tokens_per_second']:,.0f}"}
        if "load" in metrics:
            shown["load"] = " ".join(f"{share:.0%}" for share in metrics["load"])
        self._bar.set_postfix(shown, refresh=False)
        if step % self.log_every == 0 or step == self.steps:
            self._write({"step": step, **metrics})
        if self._bar.disable and (step % max(1, self.steps // 20) == 0 or step == self.steps):
            print(f"step {step}/{self.steps} " + " ".join(f"{k}={v}" for k, v in shown.items()), file=sys.stderr)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write({"step": step, **metrics})
        self.say(f"step {step}/{self.steps} held out: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot_training(metrics: Path, picture: Path) -> None:
    """Training and held-out loss (and accuracy) over steps; below, if there are routers, the share of every expert."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(metrics)
    train = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    routed = "load" in train[0]
    figure, axes = plt.subplots(1 + routed, 1, figsize=(9, 7), sharex=True, layout="constrained", squeeze=False)
    top, bottom = axes[0, 0], axes[-1, 0]
    steps = [line["step"] for line in train]
    losses = np.array([line["loss"] for line in train])
    top.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8)
    window = max(1, len(losses) // 50)
    smooth = np.convolve(np.pad(losses, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
    top.plot(steps, smooth, color="tab:blue", label=f"training loss (mean of {window})")
    right_handles, right_labels = [], []
    if held_out:
        at = [line["step"] for line in held_out]
        top.plot(at, [line["eval_loss"] for line in held_out], "o-", color="tab:orange", label="held-out loss")
        if "accuracy" in held_out[0]:
            right = top.twinx()
            right.plot(
                at, [100 * line["accuracy"] for line in held_out], "s--", color="tab:green", label="held-out accuracy"
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
        load = np.array([line["load"] for line in train]).T
        names, colors = [f"expert {e}" for e in range(len(load))], plt.get_cmap("tab20")(range(20))
        bottom.stackplot(steps, 100 * load, labels=names, colors=colors)
        bottom.set_ylabel("share of assignments (%)")
        bottom.set_ylim(0, 100)
        bottom.margins(x=0)
        bottom.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    with new_file(picture, text=False) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
