"""Fine-tuning with every method on ScienceQA, OpenBookQA and ARC-Easy, alone and mixed: test accuracy, parameters, time.

    python -m benchmarks.accuracy --model SMOLLM2_DIR --data DIR --work DIR --out benchmarks/results/DEVICE

The study is a list of short runs, each of which leaves a file in --work and is skipped when that is there: kill it, or give
it --budget-seconds, and start it again. Each run trains several lanes together (`accuracy_training`). In this order:

    bare        the backbone on all test questions
    grid        per method, the learning rates of the grid, seed 0, on the mixture: accuracy on the validation questions
    mixture     per method, all seeds at its best learning rate, on the mixture: accuracy on each set's test questions
    alone       per set and method, the same on one set: accuracy on its test questions
    ablation    the one of VARIANTS that was best in the grid, with one setting changed, at its learning rate, on the mixture

so that what is there after any number of them compares all methods on the same. The report is written after every stage.
The programs of the methods are compiled in threads while others train; keep JAX's compilation cache between calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import write_json
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.fields import require
from adafuse_jax.data.chat import encode_all, load_tokenizer
from adafuse_jax.data.packing import Rows, pack
from benchmarks import accuracy_report
from benchmarks.accuracy_data import SETS, Packed, Questions, pack_candidates, read_set, targets_of
from benchmarks.accuracy_methods import (
    ABLATIONS,
    METHODS,
    ON_ALL,
    RATE_SCALE,
    VARIANTS,
    ablated,
    available,
    changes,
    settings_of,
)
from benchmarks.accuracy_training import (
    Programs,
    Trained,
    accuracies,
    compiled,
    expert_use,
    jitted,
    target_losses,
    train,
    trainable_parameters,
)
from benchmarks.token_classes import CLASSES, classes_of

MIXTURE = "mixture"
STAGES = ("bare", "grid", "mixture", "alone", "ablation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One file in --work: a method trained on one set or the mixture, a lane for each (seed, learning rate)."""

    stage: str
    method: str
    data: str
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        lanes = ",".join(f"{seed}@{rate:g}" for seed, rate in zip(self.seeds, self.rates, strict=True))
        return f"{self.stage}-{self.data}-{self.method.replace(',', '+')}-{lanes or 'once'}"


class Study:
    """Model, data and the finished runs of a study."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.work = arguments, Path(arguments.work)
        self.sets: dict[str, Questions] = {name: read_set(name, Path(arguments.data)) for name in arguments.sets}
        self.tokenizer = load_tokenizer(arguments.model)
        self.model = load_backbone(arguments.model, arguments.dtype)
        self.results: dict[str, dict[str, Any]] = {}
        self.work.mkdir(parents=True, exist_ok=True)
        for path in self.work.glob("*.json"):
            self.results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        for name, result in self.results.items():
            was, now = result["identity"], self.identity
            changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
            require(
                not changed,
                f"{self.work / name}.json: was made with { ({key: was.get(key) for key in changed}) }, this study has "
                f"{ ({key: now.get(key) for key in changed}) }; give another --work",
            )
            method = result["run"]["method"]
            require(
                method not in METHODS or result["settings"] == json.loads(json.dumps(METHODS[method])),
                f"{self.work / name}.json: was made with {result['settings']}, which {method} no longer is; remove it",
            )
        self._rows: dict[str, Rows] = {}
        self._pool = ThreadPoolExecutor(arguments.compile_threads)
        self._programs: dict[tuple[str, int], Future[Programs]] = {}

    def programs(self, method: str, lanes: int) -> Future[Programs]:
        """Those of a method; the first call starts to compile them in another thread."""
        if (method, lanes) not in self._programs:
            made = self._pool.submit(
                compiled, self.settings_of(method), self.model, lanes=lanes, batch_size=self.arguments.batch_size,
                scored=self.scored, length=self.arguments.length, targets=self.arguments.length // 8,
            )  # fmt: skip
            self._programs[method, lanes] = made
        return self._programs[method, lanes]

    def compile_ahead(self, stage: str) -> None:
        """Start to compile what the unfinished runs of a stage and the next one need. While the grid is not finished, the
        runs after it are not known."""
        at = STAGES.index(stage)
        known = self._grids() if stage in STAGES[:2] else self.plan()
        for run in known:
            if run.seeds and run.stage in STAGES[at : at + 2] and run.name not in self.results:
                self.programs(run.method, len(run.seeds))

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def scored(self) -> int:
        """Rows that are scored together: more than a step has, as there is no backward pass."""
        return 4 * self.arguments.batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What all runs of a study share."""
        shared = {name: getattr(self.arguments, name) for name in ("epochs", "batch_size", "length", "dtype", "limit")}
        sizes = {name: [len(q.training), len(q.validation), len(q.test)] for name, q in self.sets.items()}
        return shared | {"sets": sizes, "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.model))}

    @cached_property
    def test(self) -> dict[str, Packed]:
        return {name: self._packed(questions.test) for name, questions in self.sets.items()}

    @cached_property
    def validation(self) -> Packed:
        return self._packed([q for questions in self.sets.values() for q in questions.validation])

    def _packed(self, questions: list[Any]) -> Packed:
        return pack_candidates(questions[: self.arguments.limit], self.tokenizer, self.arguments.length, self.scored)

    def training_rows(self, data: str) -> Rows:
        """Made once for each set and the mixture."""
        if data not in self._rows:
            self._rows[data] = self._pack_training(data)
        return self._rows[data]

    def _pack_training(self, data: str) -> Rows:
        names = self.sets if data == MIXTURE else (data,)
        examples = [q for name in names for q in self.sets[name].training[: self.arguments.limit]]
        encoded, _ = encode_all(examples, self.tokenizer, self.arguments.length)
        order = np.random.default_rng(0).permutation(len(encoded))  # rows hold questions of several sets
        return pack([encoded[i] for i in order], self.arguments.length)

    def plan(self) -> Iterator[Run]:
        """The runs in order; those after a grid appear when it is finished."""
        methods, seeds, lanes = self.trained_methods, self.arguments.seeds, self.arguments.lanes
        if "none" in self.arguments.methods:
            yield Run(stage="bare", method="none", data=MIXTURE, seeds=(), rates=())
        yield from self._grids()

        def final(stage: str, method: str, data: str, rate: float) -> Iterator[Run]:
            for some in batched(seeds, lanes):
                yield Run(stage=stage, method=method, data=data, seeds=some, rates=(rate,) * len(some))

        for method in methods:
            yield from final("mixture", method, MIXTURE, self.best_rate(method))
        for data in self.sets if len(self.sets) > 1 else ():
            for method in methods:
                yield from final("alone", method, data, self.best_rate(method))
        if set(VARIANTS) & set(methods):
            for name in (name for name in self.arguments.ablations if changes(name, self.ablated)):
                yield from final("ablation", name, MIXTURE, self.best_rate(self.ablated))

    @property
    def trained_methods(self) -> list[str]:
        return [name for name in self.arguments.methods if name != "none"]

    def _grids(self) -> Iterator[Run]:
        for method in self.trained_methods:
            yield from self._grid(method)

    def _grid(self, method: str) -> Iterator[Run]:
        scale = RATE_SCALE.get(method, 1.0)
        for rates in batched([scale * rate for rate in self.arguments.learning_rates], self.arguments.lanes):
            yield Run(stage="grid", method=method, data=MIXTURE, seeds=(0,) * len(rates), rates=rates)

    def best_rate(self, method: str) -> float:
        """The learning rate with the best accuracy on the validation questions; the smallest of equal ones."""
        found = [lane for run in self._grid(method) for lane in self.results[run.name]["lanes"] if not lane["diverged"]]
        require(bool(found), f"{method}: the loss is not finite with any of --learning-rates; give smaller ones")
        return max(found, key=lambda lane: (lane["validation_accuracy"], -lane["learning_rate"]))["learning_rate"]

    @property
    def ablated(self) -> str:
        """The AdaFuse that the ablations change, known when the grids are finished."""
        return ablated({name: accuracy_report.grid_of(self.results, name) for name in self.trained_methods})

    def settings_of(self, method: str) -> dict[str, Any]:
        """Of a method or an ablation."""
        return settings_of(method, self.ablated)

    def do(self, run: Run) -> None:
        """Train, score, and write the run's file, which appears complete or not at all."""
        settings = self.settings_of(run.method)
        begun = time.perf_counter()
        trained, params = None, None
        losses_of: Callable[..., jax.Array] = target_losses
        if run.seeds:
            programs = self.programs(run.method, len(run.seeds)).result()
            rows = self.training_rows(run.data)
            if targets_of(rows)[0].shape[1] > self.arguments.length // 8:
                programs = jitted(settings)  # rows with more targets than are foreseen
            trained = train(
                settings, self.model, rows, seeds=run.seeds, rates=run.rates,
                epochs=self.arguments.epochs, batch_size=self.arguments.batch_size, programs=programs,
            )  # fmt: skip
            params, losses_of = trained.lanes.params, programs.losses
        scored = {"validation": self.validation} if run.stage == "grid" else self.test
        scored = {name: packed for name, packed in scored.items() if run.data in (MIXTURE, name)}
        scores = {
            name: accuracies(self.model, params, packed, batch_size=self.scored, losses_of=losses_of)
            for name, packed in scored.items()
        }
        lanes = []
        for at in range(max(1, len(run.seeds))):
            own = {name: values[at] for name, values in scores.items()}
            result: dict[str, Any] = {"test_accuracy": own}
            if run.stage == "grid":
                result = {"validation_accuracy": own["validation"]}
            if trained is not None:
                result |= {"seed": run.seeds[at], "learning_rate": run.rates[at], "diverged": trained.diverged[at]}
            lanes.append(result)
        report: dict[str, Any] = {
            "run": dataclasses.asdict(run),
            "settings": settings,
            "trainable_params": trainable_parameters(settings, self.model),
            "lanes": lanes,
            "questions": {name: [len(packed.answers), packed.left_out] for name, packed in scored.items()},
            "identity": self.identity,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        if trained is not None:
            report |= self._training_report(run, trained)
        report["wall_seconds"] = round(time.perf_counter() - begun, 3)
        write_json(self.work / f"{run.name}.json", report)
        self.results[run.name] = report

    def _training_report(self, run: Run, trained: Trained) -> dict[str, Any]:
        report: dict[str, Any] = {
            "steps": trained.steps,
            "tokens_per_lane": trained.tokens,
            "training_seconds": round(trained.seconds, 3),
            "first_step_seconds": round(trained.first_step_seconds, 3),
            "history": trained.history,
        }
        if run.stage == "mixture" and run.method in ON_ALL:
            classes = jnp.array(classes_of(self.tokenizer, self.model.config.vocab_size))
            report["expert_use"] = {  # counts [classes, E] by data set
                name: expert_use(
                    self.model, trained.lanes, packed, classes, len(CLASSES), batch_size=self.scored
                ).tolist()
                for name, packed in self.test.items()
            }
        return report


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="folder of the data files that accuracy_data names")
    parser.add_argument("--work", required=True, help="folder for the results of single runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for accuracy.json, .md and .png")
    parser.add_argument("--methods", nargs="+", default=available(), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--ablations", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS), metavar="ABLATION")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help=f"times {RATE_SCALE}"
    )
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=8, help="packed rows per lane and step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--lanes", type=int, default=3, help="runs trained together")
    parser.add_argument("--limit", type=int, help="questions of each split, at most (to try the script)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compile-threads", type=int, default=4, help="programs compiled ahead at a time")
    parser.add_argument("--budget-seconds", type=float, help="start no run after so long")
    arguments = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "length", "lanes", "limit", "compile_threads"):
        value = getattr(arguments, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    missing = [name for name in arguments.methods if name not in available()]
    require(not missing, f"--methods {' '.join(missing)}: this version has no such adapter; leave it out")
    return arguments


def main(argv: Sequence[str]) -> int:
    begun = time.perf_counter()
    arguments = parse(argv)
    runtime.set_up()
    study = Study(arguments)
    command = "python -m benchmarks.accuracy " + " ".join(argv)
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version()}
    stage = ""
    for run in study.plan():
        if run.name in study.results:
            continue
        if run.stage != stage:
            stage = run.stage
            study.compile_ahead(stage)
            accuracy_report.write(study.results, arguments.out, command=command, machine=machine)
        elapsed = time.perf_counter() - begun
        if arguments.budget_seconds is not None and elapsed > arguments.budget_seconds:
            print(f"{elapsed:.0f} s are over the budget; {run.name} is next", file=sys.stderr)
            break
        study.do(run)
        result = study.results[run.name]
        by_lane = [next(iter(lane.values())) for lane in result["lanes"]]
        print(
            f"[{time.perf_counter() - begun:6.0f} s] {run.name}: {by_lane}, {result['wall_seconds']:.1f} s",
            file=sys.stderr,
        )
    study.close()
    accuracy_report.write(study.results, arguments.out, command=command, machine=machine)
    print((arguments.out / "accuracy.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    run_cli(main)
