"""The runs of the study, and the one that makes each.

A run trains several replicas of a method together, which differ in seed or learning rate. In this order:

    bare        the backbone on all test questions
    grid        per method, the learning rates of the grid, seed 0, on the mixture: accuracy on the validation questions
    mixture     per method, all seeds at its best learning rate, on the mixture: accuracy on each set's test questions
    alone       per set and method, the same on one set: accuracy on its test questions
    ablation    the one of VARIANTS that was best in the grid, with one setting changed, at its learning rate, on the mixture

so that the recorded runs after any number of them compare all methods on the same. Programs are compiled in threads while
others train.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import batched
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core.fields import require
from adafuse_jax.data.chat import encode_all, load_tokenizer
from adafuse_jax.data.packing import pack
from adafuse_jax.training.replicas import replica_forward
from benchmarks.common.timing import Stopwatch
from studies.questions import Packed, Questions, pack_candidates, read_set
from studies.runs import Runs
from studies.science_questions.methods import (
    METHODS,
    ON_ALL,
    RATE_SCALE,
    VARIANTS,
    ablated,
    changes,
    make,
    needs_remat,
    settings_of,
    trainable_parameters,
)
from studies.science_questions.report import grid_of
from studies.science_questions.token_classes import classes_of, expert_use
from studies.scoring import compiled_losses, score, target_losses
from studies.training import Texts, Trained, Trainer, optimizer_of, phases_of

MIXTURE = "mixture"
STAGES = ("bare", "grid", "mixture", "alone", "ablation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A method trained on one set or the mixture, a replica for each (seed, learning rate)."""

    stage: str
    method: str
    data: str
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        replicas = ",".join(f"{seed}@{rate:g}" for seed, rate in zip(self.seeds, self.rates, strict=True))
        return f"{self.stage}-{self.data}-{self.method.replace(',', '+')}-{replicas or 'once'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Compiled programs for a method and a number of steps: its trainer, and `target_losses` of its replicas."""

    trainer: Trainer
    losses: Callable[..., Any]


class Study:
    """Model, data and the recorded runs of a study."""

    def __init__(self, arguments: argparse.Namespace, runs: Runs, *, command: str):
        self.arguments, self.runs, self.command = arguments, runs, command
        self.sets: dict[str, Questions] = {name: read_set(name, Path(arguments.data)) for name in arguments.sets}
        self.tokenizer = load_tokenizer(arguments.model)
        self.model = load_backbone(arguments.model, arguments.dtype)

        def is_current(record: dict[str, Any]) -> bool:
            method = record["run"]["method"]
            return method not in METHODS or record["settings"] == json.loads(json.dumps(METHODS[method]))

        runs.require_same(json.loads(json.dumps(self.identity)), is_current)
        self._rows: dict[str, Texts] = {}
        self._pool = ThreadPoolExecutor(arguments.compile_threads)
        self._programs: dict[tuple[str, int, int], Future[Programs]] = {}

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return self.runs.all

    def programs(self, run: Run) -> Future[Programs]:
        """Compiled programs of a run; the first call starts the compilation in another thread."""
        key = run.method, len(run.seeds), self.steps(run.data)
        if key not in self._programs:
            self._programs[key] = self._pool.submit(
                self._compiled, run, self.settings_of(run.method), self.training_rows(run.data)
            )
        return self._programs[key]

    def _compiled(self, run: Run, settings: dict[str, Any], rows: Texts) -> Programs:
        steps = self.steps(run.data)
        trainer = Trainer(
            partial(make, settings), steps=steps, optimizer=optimizer_of(steps), phases=phases_of(settings, steps),
            remat="full" if needs_remat(settings) else "none",
        )  # fmt: skip
        length, batch_size = self.arguments.length, self.arguments.batch_size
        states = trainer.compile(self.model, rows, replicas=len(run.seeds), batch_size=batch_size)
        losses = compiled_losses(
            self.model, states.adapter, rows=self.scored, length=length, targets=length // 4, has_tasks=False,
            forward=replica_forward,
        )  # fmt: skip
        return Programs(trainer=trainer, losses=losses)

    def compile_ahead(self, stage: str) -> None:
        """Start to compile what the unfinished runs of a stage and the next one need. While the grid is not finished, the
        runs after it are not known."""
        at = STAGES.index(stage)
        known = self._grids() if stage in STAGES[:2] else self.plan()
        for run in known:
            if run.seeds and run.stage in STAGES[at : at + 2] and run.name not in self.results:
                self.programs(run)

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def steps(self, data: str) -> int:
        """Number of training steps on a set or the mixture."""
        per_epoch = -(-len(self.training_rows(data).tokens) // self.arguments.batch_size)
        return max(1, math.ceil(self.arguments.epochs * per_epoch))

    @property
    def scored(self) -> int:
        """Rows that are scored together: more than a step has, as there is no backward pass."""
        return 4 * self.arguments.batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Settings, sizes of the sets and parameter count that all runs of a study share."""
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
        return pack_candidates(questions[: self.arguments.limit], self.tokenizer, self.arguments.length)

    def training_rows(self, data: str) -> Texts:
        """Packed training rows, computed once for each set and the mixture."""
        if data not in self._rows:
            self._rows[data] = self._pack_training(data)
        return self._rows[data]

    def _pack_training(self, data: str) -> Texts:
        names = self.sets if data == MIXTURE else (data,)
        examples = [q for name in names for q in self.sets[name].training[: self.arguments.limit]]
        encoded, _ = encode_all(examples, self.tokenizer, self.arguments.length)
        order = np.random.default_rng(0).permutation(len(encoded))  # rows hold questions of several sets
        return Texts.of(pack([encoded[i] for i in order], self.arguments.length))

    def plan(self) -> Iterator[Run]:
        """The runs in order; those after a grid appear when it is finished."""
        methods, seeds = self.trained_methods, self.arguments.seeds
        if "none" in self.arguments.methods:
            yield Run(stage="bare", method="none", data=MIXTURE, seeds=(), rates=())
        yield from self._grids()

        def final(stage: str, method: str, data: str, rate: float) -> Iterator[Run]:
            for some in batched(seeds, self.arguments.replicas):
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
        for rates in batched([scale * rate for rate in self.arguments.learning_rates], self.arguments.replicas):
            yield Run(stage="grid", method=method, data=MIXTURE, seeds=(0,) * len(rates), rates=rates)

    def best_rate(self, method: str) -> float:
        """The learning rate with the best accuracy on the validation questions; the smallest of equal ones."""
        trained = [replica for run in self._grid(method) for replica in self.results[run.name]["replicas"]]
        found = [replica for replica in trained if not replica["diverged"]]
        require(bool(found), f"{method}: the loss is not finite with any of --learning-rates; give smaller ones")
        best = max(found, key=lambda replica: (replica["validation_accuracy"], -replica["learning_rate"]))
        return best["learning_rate"]

    @property
    def ablated(self) -> str:
        """The AdaFuse that the ablations change, known when the grids are finished."""
        return ablated({name: grid_of(self.results, name) for name in self.trained_methods})

    def settings_of(self, method: str) -> dict[str, Any]:
        """Settings of a method or an ablation."""
        return settings_of(method, self.ablated)

    def do(self, run: Run) -> dict[str, Any]:
        """Train, score, and record a run."""
        settings = self.settings_of(run.method)
        watch = Stopwatch()
        trained, adapter = None, None
        losses_of: Callable[..., Any] = target_losses
        if run.seeds:
            programs = self.programs(run).result()
            trained = programs.trainer.train(
                self.model, self.training_rows(run.data), seeds=run.seeds, rates=run.rates,
                batch_size=self.arguments.batch_size, points=40,
            )  # fmt: skip
            adapter, losses_of = trained.adapter, programs.losses
        scored = {"validation": self.validation} if run.stage == "grid" else self.test
        scored = {name: packed for name, packed in scored.items() if run.data in (MIXTURE, name)}
        scores = {
            name: accuracies(self.model, adapter, packed, batch_size=self.scored, losses_of=losses_of)
            for name, packed in scored.items()
        }
        replicas = []
        for at in range(max(1, len(run.seeds))):
            own = {name: values[at] for name, values in scores.items()}
            result: dict[str, Any] = {"test_accuracy": own}
            if run.stage == "grid":
                result = {"validation_accuracy": own["validation"]}
            if trained is not None:
                result |= {"seed": run.seeds[at], "learning_rate": run.rates[at], "diverged": trained.diverged[at]}
            replicas.append(result)
        record: dict[str, Any] = {
            "run": dataclasses.asdict(run),
            "settings": settings,
            "trainable_params": trainable_parameters(settings, self.model),
            "replicas": replicas,
            "questions": {name: [len(packed.answers), packed.left_out] for name, packed in scored.items()},
            "identity": self.identity,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "command": self.command,
        }
        if trained is not None:
            record |= self._training_record(run, trained)
        record["wall_seconds"] = round(watch.seconds, 3)
        return self.runs.add(run.name, record)

    def _training_record(self, run: Run, trained: Trained) -> dict[str, Any]:
        record: dict[str, Any] = {
            "steps": self.steps(run.data),
            "tokens_per_replica": trained.tokens,
            "training_seconds": round(trained.seconds, 3),
            "first_step_seconds": round(trained.first_step_seconds, 3),
            "history": trained.history,
        }
        if run.stage == "mixture" and run.method in ON_ALL:
            classes = classes_of(self.tokenizer, self.model.config.vocab_size)
            first = jax.tree.map(lambda leaf: leaf[0], trained.adapter)
            record["expert_use"] = {  # counts [classes, E] by data set
                name: expert_use(self.model, first, packed, classes, batch_size=self.scored).tolist()
                for name, packed in self.test.items()
            }
        return record


def accuracies(
    model: Any, adapter: Any, packed: Packed, *, batch_size: int, losses_of: Callable[..., Any] = target_losses
) -> list[float]:
    """Share of questions that each replica answers right: the candidate with the largest log-likelihood is the answer."""
    losses, _ = score(model, adapter, packed, batch_size=batch_size, losses_of=losses_of)
    return [packed.accuracy(packed.sums(of_replica)) for of_replica in losses]
