"""The tables of the study from its records, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.accuracy.scoring import score
from studies.accuracy.study import best_rate, grid_of
from studies.accuracy.tasks import SETS

BASELINES = ("lora", "rslora")
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Two-sided 95% quantiles of Student's t for 1, 2, … degrees of freedom."""


def report(records: Mapping[str, dict[str, Any]]) -> str:
    arms = sorted({record["run"]["arm"] for record in records.values()}, key=lambda arm: -_best_mean(records, arm))
    first = next(iter(records.values()))
    identity = first["identity"]
    parts = [
        "# Pre-gated experts on a mixture of tasks that pull apart",
        f"Made by `python -m studies.accuracy --report`. {', '.join(sorted({r['device'] for r in records.values()}))}, "
        f"JAX {first['jax']}; {identity['steps']} steps of {identity['batch_size']} rows, {identity['dtype']} backbone of "
        f"{identity['parameters'] / 1e6:.1f} M parameters, mixture {identity['mixture']}, scored on its "
        f"**{identity['split']}** questions. Sets, splits and measures: `studies/accuracy/tasks.py`; arms: `arms.py`.",
        "Recorded by:\n" + "\n".join(f"- `{command}`" for command in sorted({r["command"] for r in records.values()})),
        "## Each arm at its best learning rate, seed 0",
        _scores(records, arms),
        "Scores in points, the mean over the sets last. gsm8k: the mean of exact match and likelihood. One seed: "
        "differences of a point are no finding.",
        "## What lies behind the scores",
        _details(records, arms),
        "## The mixture's mean by learning rate, seed 0",
        _grids(records, arms),
        "A best rate at an edge of its grid is marked with *; its grid is to be extended.",
    ]
    if any(record["run"]["stage"] == "seeds" for record in records.values()):
        parts += ["## Several seeds", _seeds(records, arms)]
    parts += ["## Seconds", _seconds(records)]
    return "\n\n".join(parts) + "\n"


def _best_mean(records: Mapping[str, dict[str, Any]], arm: str) -> float:
    rate = best_rate(records, arm)
    return -1.0 if rate is None else grid_of(records, arm)[rate]["mean"]


def _of_arm(records: Mapping[str, dict[str, Any]], arm: str) -> dict[str, Any]:
    return next(record for record in records.values() if record["run"]["arm"] == arm)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _best(records: Mapping[str, dict[str, Any]], arms: Sequence[str]) -> list[tuple[str, float, dict[str, Any]]]:
    rates = [(arm, best_rate(records, arm)) for arm in arms]
    return [(arm, rate, grid_of(records, arm)[rate]) for arm, rate in rates if rate is not None]


def _scores(records: Mapping[str, dict[str, Any]], arms: Sequence[str]) -> str:
    rows = []
    for arm, rate, replica in _best(records, arms):
        size = _of_arm(records, arm)["parameters"]
        scores = [f"{score(name, replica['measures'][name]):.1f}" for name in SETS]
        sizes = [f"{size['active'] / 1e6:.1f} M", f"{size['total'] / 1e6:.1f} M"]
        rows.append([arm, *sizes, f"{rate:g}", *scores, f"**{replica['mean']:.2f}**"])
    return _table(["arm", "active", "total", "learning rate", *SETS, "mean"], rows)


def _details(records: Mapping[str, dict[str, Any]], arms: Sequence[str]) -> str:
    rows = []
    for arm, _, replica in _best(records, arms):
        of = replica["measures"]
        losses = [f"{of[name]['loss']:.3f}" for name in ("gsm8k", "code", "instruct", "vel", "dor")]
        choices = [f"{of[name]['choice_loss']:.3f}" for name in ("scienceqa", "openbookqa", "arc-easy")]
        load = replica.get("load")
        use = "" if load is None else f"{min(load):.2f} to {max(load):.2f}"
        rows.append([arm, f"{of['gsm8k']['exact']:.1f}", *losses, *choices, use])
    head = ["arm", "gsm8k exact", "gsm8k loss", "code loss", "instruct loss", "vel loss", "dor loss"]
    return _table([*head, "scienceqa −log p", "openbookqa −log p", "arc-easy −log p", "experts' shares"], rows)


def _grids(records: Mapping[str, dict[str, Any]], arms: Sequence[str]) -> str:
    found = {arm: grid_of(records, arm) for arm in arms}
    rates = sorted({rate for of in found.values() for rate in of})
    rows = []
    for arm in arms:
        best, tried = best_rate(records, arm), list(found[arm])
        cells = []
        for rate in rates:
            mean = f"{found[arm][rate]['mean']:.2f}" if rate in found[arm] else ""
            edge = "*" if rate == best and len(tried) > 1 and rate in (tried[0], tried[-1]) else ""
            cells.append(f"**{mean}**{edge}" if rate == best else mean)
        rows.append([arm, *cells])
    return _table(["arm", *(f"{rate:g}" for rate in rates)], rows)


def _seeds(records: Mapping[str, dict[str, Any]], arms: Sequence[str]) -> str:
    """Means over the seeds, and paired differences from the best LoRA with 95% intervals of Student's t."""
    means: dict[str, dict[int, float]] = {}
    for record in records.values():
        if record["run"]["stage"] == "seeds":
            of = means.setdefault(record["run"]["arm"], {})
            of |= {replica["seed"]: replica["mean"] for replica in record["replicas"] if not replica["diverged"]}
    plain = [arm for arm in means if arm.startswith(BASELINES)]
    base = max(plain, key=lambda arm: float(np.mean(list(means[arm].values()))), default=None)
    rows = []
    for arm in (arm for arm in arms if arm in means):
        row = [arm, str(len(means[arm])), f"{np.mean(list(means[arm].values())):.2f}"]
        rows.append([*row, "" if base is None or arm == base else _difference(means[arm], means[base])])
    return _table(["arm", "seeds", "mean", f"difference from {base}"], rows)


def _difference(one: Mapping[int, float], other: Mapping[int, float]) -> str:
    paired = np.array([one[seed] - other[seed] for seed in one if seed in other])
    if len(paired) < 2:
        return ""
    half = T_95[min(len(paired), len(T_95) + 1) - 2] * paired.std(ddof=1) / len(paired) ** 0.5
    return f"{paired.mean():+.2f} ± {half:.2f}"


def _seconds(records: Mapping[str, dict[str, Any]]) -> str:
    names = ("training_seconds", "scoring_seconds", "decoding_seconds", "compile_wait_seconds")
    rows = [
        [name, str(len(record["replicas"])), *(f"{record[column]:.1f}" for column in names)]
        for name, record in sorted(records.items())
    ]
    return _table(["run", "replicas", "training", "scoring", "decoding", "waiting for compilation"], rows)
