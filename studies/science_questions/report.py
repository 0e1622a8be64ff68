"""The results of the study: NAME.json, a table in the shape of the paper's (NAME.md), and plots, NAME*.png.

A row is a method under one regime, "mixture" (trained on all sets together) or "alone" (on each set by itself). Its mean
accuracy is the mean over the sets, taken for each seed; the standard error is that of these means over the seeds, their std
(with n − 1) / sqrt(n). It holds what seeds change, not the choice of the test questions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adafuse_jax.core.atomic_files import write_json, write_text
from studies.science_questions.methods import ABLATIONS, METHODS, ablated, changes
from studies.science_questions.token_classes import CLASSES

NAME = "science_questions"
TRAINED = [name for name in METHODS if name != "none"]
REGIMES = ("bare", "mixture", "alone", "ablation")
LABELS = {"mixture": "trained on the mixture", "alone": "on each set alone"}
COLOURS = {"mixture": "tab:blue", "alone": "tab:orange", "ablation": "tab:green", "bare": "0.4"}


def summarise(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table, one per method and regime, from the recorded runs; a regime is left out until all its sets are
    recorded."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results.values():
        if result["run"]["stage"] != "grid":
            groups[result["run"]["stage"], result["run"]["method"]].append(result)
    rows = []
    for (regime, method), found in groups.items():
        sets = sorted(found[0]["identity"]["sets"])
        by_seed: dict[int | None, dict[str, float]] = defaultdict(dict)
        for result in found:
            for replica in result["replicas"]:
                by_seed[replica.get("seed")] |= replica["test_accuracy"]
        whole = {seed: scores for seed, scores in by_seed.items() if sorted(scores) == sets}
        if whole:
            rows.append(_row(regime, method, found, sets, whole, grid_of(results, method)))
    names = [*METHODS, *ABLATIONS]
    return sorted(rows, key=lambda row: (REGIMES.index(row["regime"]), names.index(row["method"])))


def _row(
    regime: str,
    method: str,
    found: list[dict[str, Any]],
    sets: list[str],
    whole: dict[Any, dict[str, float]],
    grid: Any,
) -> dict[str, Any]:
    means = [float(np.mean([scores[name] for name in sets])) for scores in whole.values()]
    trained = [result for result in found if "training_seconds" in result]
    replicas = sum(len(result["replicas"]) for result in trained)
    return {
        "method": method,
        "regime": regime,
        "settings": found[0]["settings"],
        "mean_accuracy": float(np.mean(means)),
        "standard_error": _standard_error(means),
        "per_set": {
            name: {
                "accuracy": float(np.mean([scores[name] for scores in whole.values()])),
                "standard_error": _standard_error([scores[name] for scores in whole.values()]),
                "seeds": [scores[name] for scores in whole.values()],
            }
            for name in sets
        },
        "seeds": list(whole) if trained else [],
        "trainable_params": found[0]["trainable_params"],
        "learning_rate": found[0]["replicas"][0].get("learning_rate"),
        "diverged": any(replica.get("diverged", False) for result in found for replica in result["replicas"]),
        "validation_accuracy_by_learning_rate": grid,
        "seconds_per_seed": sum(r["training_seconds"] for r in trained) / replicas * _runs_per_seed(trained)
        if replicas
        else 0.0,
        "replicas_trained_together": max((len(r["replicas"]) for r in trained), default=0),
        "devices": sorted({result["device"] for result in found}),
    }


def _runs_per_seed(trained: list[dict[str, Any]]) -> int:
    """Number of runs per seed: one on the mixture; alone, one for each set."""
    return len({result["run"]["data"] for result in trained})


def grid_of(results: Mapping[str, dict[str, Any]], method: str) -> dict[str, float]:
    """Validation accuracy by learning rate, as far as it has been run."""
    found = [r for r in results.values() if (r["run"]["stage"], r["run"]["method"]) == ("grid", method)]
    replicas = [replica for result in found for replica in result["replicas"]]
    return {f"{replica['learning_rate']:g}": replica["validation_accuracy"] for replica in replicas}


def _standard_error(values: list[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def write(results: Mapping[str, dict[str, Any]], out: Path) -> None:
    """All files in the folder `out`, from the results of the runs so far."""
    rows = summarise(results)
    out.mkdir(parents=True, exist_ok=True)

    def of_all(name: str) -> str:
        return " and ".join(sorted({result[name] for result in results.values()}))

    some = next(iter(results.values()), None)
    questions = {k: v for r in results.values() if r["run"]["data"] == "mixture" for k, v in r["questions"].items()}
    table: dict[str, Any] = {
        **{name: of_all(name) for name in ("command", "device", "jax", "python")},
        "study": None if some is None else some["identity"],
        "scored_and_left_out": questions,
        "validation": {name: found for name in METHODS if (found := grid_of(results, name))},
        "rows": rows,
    }
    write_json(out / f"{NAME}.json", table)
    write_text(out / f"{NAME}.md", markdown(rows, table))
    if rows:
        plot(rows, ablated(table["validation"]), out / f"{NAME}.png")
    for used in (result for result in results.values() if "expert_use" in result):
        plot_experts(used, out / f"{NAME}_experts_{used['run']['method']}.png")


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def markdown(rows: list[dict[str, Any]], table: dict[str, Any]) -> str:
    """The paper's Tables 2 to 4: a method a line, its accuracy on each set and their average, in percent."""
    if not rows:
        return "No run is finished yet.\n"
    study = table["study"]
    sets = sorted(study["sets"])
    sizes = "; ".join(f"{name} {a} / {b} / {c}" for name, (a, b, c) in study["sets"].items())
    lines = [
        f"`{table['command']}`",
        "",
        f"{table['device']}, JAX {table['jax']}; {study['epochs']:g} epochs, {study['batch_size']} rows of "
        f"{study['length']} tokens a step, {study['dtype']} backbone. Training / validation / test questions: {sizes}.",
        "Test accuracy in percent by log-likelihood, mean ± standard error over the seeds. The learning rate of each method",
        "is the one with the best accuracy on the validation questions of the mixture.",
    ]
    lines += _grid_table(table["validation"], table["scored_and_left_out"].get("validation", [0])[0])
    base = ablated(table["validation"])
    titles = {
        "mixture": "Trained on all sets together",
        "alone": "Trained on each set alone",
        "ablation": f"{base} with one setting changed, trained on all sets together",
    }
    bare = [row for row in rows if row["regime"] == "bare"]
    for regime, title in titles.items():
        mine = [row for row in rows if row["regime"] == regime]
        missing = [name for name in _planned(regime, base) if name not in {row["method"] for row in mine}]
        reference = [row for row in rows if (row["regime"], row["method"]) == ("mixture", base)]
        lines += ["", f"## {title}", ""]
        lines.append(
            "| method | trainable | " + " | ".join(sets) + " | average | learning rate | seeds | seconds a seed |"
        )
        lines.append("|---|---|" + "---|" * (len(sets) + 4))
        for row in (reference if regime == "ablation" else bare) + mine:
            cells = [
                _percent(row["per_set"][name]["accuracy"], row["per_set"][name]["standard_error"]) for name in sets
            ]
            average = _percent(row["mean_accuracy"], row["standard_error"])
            rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
            seconds = f"{row['seconds_per_seed']:.1f}" if row["seeds"] else ""
            size, seeds = f"{row['trainable_params'] / 1e6:.2f} M", str(len(row["seeds"]) or "")
            lines.append(f"| {' | '.join([row['method'], size, *cells, f'**{average}**', rate, seeds, seconds])} |")
        lines += [f"| {name} | {'| ' * len(sets)}| not run yet | | | |" for name in missing]
    diverged = [f"{row['method']} ({row['regime']})" for row in rows if row["diverged"]]
    if diverged:
        lines += ["", f"The loss of some seed was not finite: {', '.join(diverged)}."]
    replicas = max(row["replicas_trained_together"] for row in rows)
    if replicas:
        sharing = f"up to {replicas} seeds train in one program, which shares their time."
        lines += ["", f"Seconds are those of the optimiser steps; {sharing}", *_which_device(rows)]
    left = {name: counts for name, counts in table["scored_and_left_out"].items() if counts[1]}
    if left:
        left_out = ", ".join(f"{dropped} of {used + dropped} of {name}" for name, (used, dropped) in left.items())
        lines += ["", f"Left out because they do not fit {study['length']} tokens: {left_out}."]
    return "\n".join(lines) + "\n"


def _which_device(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each device or pair of them that rows were trained on, if they are not all the same."""
    by_devices: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_devices[" and ".join(row["devices"])].append(f"{row['method']} ({row['regime']})")
    if len(by_devices) < 2:
        return []
    return [f"Run on {devices}: {', '.join(those)}." for devices, those in by_devices.items()]


def _planned(regime: str, base: str) -> list[str]:
    """The rows of a regime when the whole study is done."""
    if regime == "ablation":
        return [name for name in ABLATIONS if changes(name, base)]
    return TRAINED


def _grid_table(found: Mapping[str, Mapping[str, float]], questions: int) -> list[str]:
    """Validation accuracies, which choose the learning rates and compare nothing: one seed, few questions."""
    width = max((len(rates) for rates in found.values()), default=1)
    lines = ["", "## Learning rates: accuracy on the validation questions", ""]
    lines.append(f"Seed 0, {questions} questions of the mixture; in percent, the learning rate in parentheses.")
    lines += ["", "| method |" + " |" * width, "|---|" + "---|" * width]
    for name in TRAINED:
        cells = [f"{100 * accuracy:.2f} ({rate})" for rate, accuracy in found.get(name, {}).items()] or ["not run yet"]
        lines.append(f"| {' | '.join([name, *cells, *[''] * (width - len(cells))])} |")
    return lines


def plot(rows: list[dict[str, Any]], base: str, path: Path) -> None:
    """Mean accuracy of every row with its error, one panel for the methods and one for the ablations of `base`."""
    from matplotlib.figure import Figure

    bare = next((row["mean_accuracy"] for row in rows if row["regime"] == "bare"), None)
    methods = [row for row in rows if row["regime"] in LABELS]
    ablations = [row for row in rows if row["regime"] == "ablation"]
    if ablations:
        ablations = [row for row in methods if (row["regime"], row["method"]) == ("mixture", base)] + ablations
    panels = {title: p for title, p in (("Methods", methods), (f"{base}, one setting changed", ablations)) if p}
    if not panels:
        return
    lines = max(len({row["method"] for row in panel}) for panel in panels.values())
    figure = Figure(figsize=(7.5 * len(panels), 1.6 + 0.42 * lines), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        names = list(dict.fromkeys(row["method"] for row in panel))
        for row in panel:
            y = names.index(row["method"]) + {"mixture": -0.12, "alone": 0.12}.get(row["regime"], 0.0) * (
                panel is methods
            )
            mean, error, colour = 100 * row["mean_accuracy"], 100 * (row["standard_error"] or 0), COLOURS[row["regime"]]
            axes.errorbar(mean, y, xerr=error, fmt="o", color=colour, capsize=3)
            points = 100 * np.mean([entry["seeds"] for entry in row["per_set"].values()], axis=0)
            axes.plot(points, [y] * len(points), "|", color=colour, alpha=0.5)
        for regime in (regime for regime in LABELS if any(row["regime"] == regime for row in panel)):
            axes.plot([], [], "o", color=COLOURS[regime], label=LABELS[regime])
        parameters = {row["method"]: row["trainable_params"] for row in panel}
        axes.set_yticks(range(len(names)), [f"{name}  ({parameters[name] / 1e6:.2g} M)" for name in names])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        if bare is not None:
            axes.axvline(100 * bare, color="0.4", linestyle=":", label="bare backbone")
        axes.set_xlabel(
            "test accuracy, mean of the sets (%)\ndot: mean ± standard error of the seeds; ticks: the seeds"
        )
        axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=120)


def plot_experts(result: dict[str, Any], path: Path) -> None:
    """Plot the experts that AdaFuse's first replica uses: by data set, by class of token, and over training."""
    from matplotlib.figure import Figure

    counts = {name: np.array(table) for name, table in result["expert_use"].items()}  # [C, E] each
    by_set = np.array([table.sum(0) for table in counts.values()])
    by_class = np.sum(list(counts.values()), axis=0)
    present = np.flatnonzero(by_class.sum(1) > 0)
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.2, 1.2])
    _shares(left, by_set, list(counts), "by data set (test questions)")
    tokens = by_class.sum(1) / by_class.sum()
    labels = [f"{CLASSES[i]} ({100 * tokens[i]:.0f}%)" for i in present]
    _shares(middle, by_class[present], labels, "by class of token (share of all tokens)")
    history = [point for point in result["history"] if point["load"] is not None]
    loads = np.array([point["load"] for point in history])
    steps = [point["step"] for point in history]
    for expert in range(loads.shape[1]):
        right.plot(steps, 100 * loads[:, expert], label=str(expert))
    right.axhline(100 / loads.shape[1], color="0.5", linestyle=":")
    right.set(
        xlabel="step", ylabel="share of the assignments (%)", title="over training (dotted: even use)", ylim=(0, None)
    )
    right.legend(title="expert", fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)


def _shares(axes: Any, counts: np.ndarray, labels: list[str], title: str) -> None:
    """A heat map of each row's shares, in percent."""
    shares = 100 * counts / counts.sum(1, keepdims=True)
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=max(30, shares.max()))
    for (row, column), share in np.ndenumerate(shares):
        colour = "w" if share > 0.6 * max(30, shares.max()) else "k"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(shares.shape[1]))
    axes.set(xlabel="expert", title=f"Use of experts (%)\n{title}")
