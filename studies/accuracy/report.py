"""The tables of the study from its records, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.accuracy.scoring import mixture_mean, probability_mean, score
from studies.accuracy.study import best_rate, grid_of
from studies.accuracy.tasks import PASSED, SETS

LORA = ("lora", "rslora")
Records = Mapping[str, dict[str, Any]]
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t for 1, 2, … degrees of freedom."""


def report(records: Records) -> str:
    arms = sorted(
        {r["run"]["arm"] for r in records.values() if r["run"]["stage"] != "bare"},
        key=lambda arm: -_best_mean(records, arm),
    )
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
        parts += [
            "## Each arm at its best learning rate, other seeds",
            _seeds(records, arms),
            "Means over the seeds ± half a 95% interval. Probability mean: 100 · exp(−loss), averaged over the sets.",
            "## Differences from LoRA, seed by seed",
            _differences(records, arms),
        ]
    bare = [record for record in records.values() if record["run"]["stage"] == "bare"]
    if bare:
        of = bare[0]["replicas"][0]["measures"]
        cells = [f"{score(name, of[name]):.1f}" for name in SETS]
        passed = [f"{of['code'][PASSED]:.1f}"] if PASSED in of["code"] else []
        head = [*SETS, "mean", *(["pass@1"] if passed else [])]
        parts += ["## The bare backbone", _table(head, [[*cells, f"{mixture_mean(of):.2f}", *passed]])]
    if any(PASSED in replica["measures"]["code"] for record in records.values() for replica in record["replicas"]):
        parts += ["## pass@1 of our programming problems", _passed(records, arms)]
    parts += ["## Seconds", _seconds(records)]
    return "\n\n".join(parts) + "\n"


def _passed(records: Records, arms: Sequence[str]) -> str:
    """pass@1 at the best learning rate: seed 0, and the mean over the other seeds."""
    seeds = _trained(records, arms)
    rows = []
    for arm, _, replica in _best(records, arms):
        of_seeds = [r["measures"]["code"][PASSED] for r in seeds.get(arm, {}).values()]
        rows.append([arm, f"{replica['measures']['code'][PASSED]:.1f}", _interval(of_seeds)])
    return _table(["arm", "seed 0", "other seeds"], rows)


def _best_mean(records: Records, arm: str) -> float:
    rate = best_rate(records, arm)
    return -1.0 if rate is None else grid_of(records, arm)[rate]["mean"]


def _of_arm(records: Records, arm: str) -> dict[str, Any]:
    return next(record for record in records.values() if record["run"]["arm"] == arm)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _best(records: Records, arms: Sequence[str]) -> list[tuple[str, float, dict[str, Any]]]:
    rates = [(arm, best_rate(records, arm)) for arm in arms]
    return [(arm, rate, grid_of(records, arm)[rate]) for arm, rate in rates if rate is not None]


def _scores(records: Records, arms: Sequence[str]) -> str:
    rows = []
    for arm, rate, replica in _best(records, arms):
        size = _of_arm(records, arm)["parameters"]
        scores = [f"{score(name, replica['measures'][name]):.1f}" for name in SETS]
        sizes = [f"{size['active'] / 1e6:.1f} M", f"{size['total'] / 1e6:.1f} M"]
        rows.append([arm, *sizes, f"{rate:g}", *scores, f"**{replica['mean']:.2f}**"])
    return _table(["arm", "active", "total", "learning rate", *SETS, "mean"], rows)


def _details(records: Records, arms: Sequence[str]) -> str:
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


def _grids(records: Records, arms: Sequence[str]) -> str:
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


def _seeds(records: Records, arms: Sequence[str]) -> str:
    """The sets' scores, means over the seeds; of the two means with half a 95% interval of Student's t."""
    rows = []
    for arm, replicas in _trained(records, arms).items():
        measures = [replica["measures"] for replica in replicas.values()]
        scores = [f"{np.mean([score(name, of[name]) for of in measures]):.1f}" for name in SETS]
        means = [_interval([mean(of) for of in measures]) for mean in (mixture_mean, probability_mean)]
        rows.append([arm, str(len(replicas)), *scores, f"**{means[0]}**", means[1]])
    return _table(["arm", "seeds", *SETS, "mean", "probability mean"], rows)


def _differences(records: Records, arms: Sequence[str]) -> str:
    """Table of score differences, seed by seed: each arm that is no LoRA minus the best LoRA of as many active, and of
    as many total, parameters."""
    found = _trained(records, arms)
    rows = []
    for arm in (arm for arm in found if not arm.startswith(LORA)):
        row = [arm]
        for cost in ("active", "total"):
            base = _baseline(records, found, arm, cost)
            row.append(base or "none recorded")
            for mean in (mixture_mean, probability_mean):
                seeds = [seed for seed in found[arm] if base and seed in found[base]]
                paired = [mean(found[arm][s]["measures"]) - mean(found[base or arm][s]["measures"]) for s in seeds]
                row.append(_interval(paired, sign="+"))
        rows.append(row)
    head = ["equal active", "mean", "probability mean", "equal total", "mean", "probability mean"]
    return _table(["arm", *head], rows)


def _trained(records: Records, arms: Sequence[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """arm → seed → replica of the stage `seeds`, those that did not diverge."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records.values():
        if record["run"]["stage"] == "seeds":
            of = found.setdefault(record["run"]["arm"], {})
            of |= {replica["seed"]: replica for replica in record["replicas"] if not replica["diverged"]}
    return {arm: found[arm] for arm in arms if arm in found}


def _baseline(records: Records, found: Mapping[str, Any], arm: str, cost: str) -> str | None:
    """The LoRA with the best mean over its seeds among those of the same cost within 10%."""
    own = _of_arm(records, arm)["parameters"][cost]
    same = [
        name
        for name in found
        if name.startswith(LORA) and abs(_of_arm(records, name)["parameters"][cost] / own - 1) < 0.1
    ]
    return max(same, key=lambda name: float(np.mean([r["mean"] for r in found[name].values()])), default=None)


def _interval(values: Sequence[float], sign: str = "") -> str:
    """Mean ± half a 95% interval; the mean alone of one value, nothing of none."""
    if len(values) < 2:
        return "".join(f"{value:{sign}.2f}" for value in values)
    half = T_95[min(len(values), len(T_95) + 1) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{sign}.2f} ± {half:.2f}"


def _seconds(records: Records) -> str:
    names = ("training_seconds", "scoring_seconds", "decoding_seconds", "compile_wait_seconds")
    rows = [
        [name, str(len(record["replicas"])), *(f"{record[column]:.1f}" for column in names)]
        for name, record in sorted(records.items())
    ]
    return _table(["run", "replicas", "training", "scoring", "decoding", "waiting for compilation"], rows)
