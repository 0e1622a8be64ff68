"""The runs of the study. A recorded run is not run again.

    grid     an arm at all learning rates of the grid, seed 0
    seeds    an arm at its best learning rate, on several seeds
    bare     an arm that is not trained: the scores of the backbone

A run trains its replicas together, and scores them on the questions of the mixture file.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core.fields import require
from adafuse_jax.models.config import DType
from benchmarks.common.timing import Stopwatch
from studies.accuracy import arms, expert_use, generation, mixture, pregated, scoring
from studies.accuracy.programs import outcomes
from studies.accuracy.tasks import PASSED, SETS
from studies.carried import carried_vocabulary
from studies.runs import Records, Runs
from studies.scoring import compiled_losses
from studies.training import Trainer, optimizer_of, phases_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings that all runs of a study share; a part of every record."""

    steps: int = 640
    batch_size: int = 8
    dtype: DType = "bfloat16"
    new_tokens: int = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An arm trained on the mixture, a replica for each (seed, learning rate)."""

    stage: str
    arm: str
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.arm}-" + ",".join(
            f"{seed}@{rate:g}" for seed, rate in zip(self.seeds, self.rates, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Compiled programs for an arm and a number of replicas."""

    trainer: Trainer
    losses: Any
    greedy: Any
    expert_use: Any


class Study:
    """Backbone, mixture, and the records that are there."""

    def __init__(
        self,
        model: str,
        mixture_file: Path,
        runs: Runs,
        plan: Plan,
        *,
        programs: bool = False,
        command: str = "",
        threads: int = 3,
    ):
        """`programs`: pass@1 is measured too, and is a part of the identity."""
        from tokenizers import Tokenizer

        self.plan, self.runs, self.command = plan, runs, command
        self.vocabulary = carried_vocabulary(model)
        self.mixture = mixture.load(mixture_file, self.vocabulary)
        self.problems = self.mixture.programs if programs else None
        require(
            not programs or self.problems is not None,
            f"--mixture {mixture_file}: has no programs; make it with --prepare",
        )
        self.prompts = self.mixture.prompts if programs else self.mixture.prompts.without_programs()
        self.model = load_backbone(model, plan.dtype)
        self.tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))

        def is_current(record: dict[str, Any]) -> bool:
            arm = record["run"]["arm"]
            return arm not in arms.ARMS or arms.restored(record["settings"]) == arms.ARMS[arm]

        runs.require_same(self.identity, is_current)
        self._pool = ThreadPoolExecutor(threads)
        self._programs: dict[tuple[str, int], Future[Programs]] = {}

    @property
    def records(self) -> Records:
        return self.runs.all

    @property
    def identity(self) -> dict[str, Any]:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.model))
        kind = {"mixture": self.mixture.digest, "split": self.mixture.split, "parameters": parameters}
        problems = {} if self.problems is None else {"programs": self.problems}
        return dataclasses.asdict(self.plan) | kind | problems

    def programs(self, arm: str, replicas: int) -> Future[Programs]:
        """Compiled programs of an arm; the first call starts the compilation in another thread."""
        if (arm, replicas) not in self._programs:
            self._programs[arm, replicas] = self._pool.submit(self._compiled, arm, replicas)
        return self._programs[arm, replicas]

    def _compiled(self, arm: str, replicas: int) -> Programs:
        plan, settings, rows = self.plan, arms.ARMS[arm], self.mixture.training
        trainer = Trainer(
            partial(arms.make, settings), steps=plan.steps,
            optimizer=optimizer_of(plan.steps, pregated.OWN_RATES),
            phases=phases_of(settings, plan.steps), forward=pregated.forward,
        )  # fmt: skip
        trained = trainer.compile(self.model, rows, replicas=replicas, batch_size=plan.batch_size).adapter
        length, prompts = rows.tokens.shape[1], self.prompts

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        losses = compiled_losses(
            self.model, trained, rows=2 * plan.batch_size, length=length, targets=length, has_tasks=True,
            forward=pregated.forward,
        )  # fmt: skip
        count = len(prompts.lengths)
        greedy = generation.greedy.lower(
            self.model, trained, integers(*prompts.tokens.shape), integers(count), integers(count),
            integers(len(self.mixture.stops)), new_tokens=plan.new_tokens,
        ).compile()  # fmt: skip
        used = expert_use.compiled(self.model, trained, rows=2 * plan.batch_size, length=length)
        return Programs(trainer=trainer, losses=losses, greedy=greedy, expert_use=used)

    def do_all(self, runs: Sequence[Run], *, budget_seconds: float | None, watch: Stopwatch) -> None:
        """Do the unfinished of `runs`; none is started that would end after the budget, which `watch` counts, if it took as
        long as the longest."""
        left = [run for run in runs if run.name not in self.records]
        longest = 0.0
        for at, run in enumerate(left):
            elapsed = watch.seconds
            if budget_seconds is not None and elapsed + longest > budget_seconds:
                print(f"[{elapsed:5.0f} s] {run.name} does not fit {budget_seconds:g} s; start again", file=sys.stderr)
                break
            for later in left[at : at + 4]:
                self.programs(later.arm, len(later.seeds))
            record = self.do(run)
            longest = max(longest, record["wall_seconds"])
            means = [round(replica["mean"], 2) for replica in record["replicas"]]
            print(
                f"[{watch.seconds:5.0f} s] {run.name}: {means}, training {record['training_seconds']:.0f} s "
                f"of {record['wall_seconds']:.0f}",
                file=sys.stderr,
                flush=True,
            )
        self._pool.shutdown(wait=False, cancel_futures=True)

    def do(self, run: Run) -> dict[str, Any]:
        """Train unless the run is bare, score, and write the record."""
        settings, plan = arms.ARMS[run.arm], self.plan
        wall = Stopwatch()
        programs = self.programs(run.arm, len(run.seeds)).result()
        compile_wait_seconds = wall.seconds
        trained = programs.trainer.train(
            self.model, self.mixture.training, seeds=run.seeds, rates=run.rates, batch_size=plan.batch_size, points=20,
            steps=0 if run.stage == "bare" else plan.steps,
        )  # fmt: skip
        scoring_watch = Stopwatch()
        measures = scoring.measures(
            self.model, trained.adapter, self.mixture.scored, batch_size=2 * plan.batch_size, losses_of=programs.losses
        )
        use = programs.expert_use(self.model, trained.adapter, self.mixture.scored)
        scoring_seconds, decoding_watch = scoring_watch.seconds, Stopwatch()
        replies = self.replies(programs, trained.adapter)
        decoding_seconds, judging_watch = decoding_watch.seconds, Stopwatch()
        numbers, replicas = self.prompts.numbers, []
        for at, (seed, rate) in enumerate(zip(run.seeds, run.rates, strict=True)):
            replica: dict[str, Any] = {"seed": seed, "learning_rate": rate, "diverged": trained.diverged[at]}
            measures[at]["gsm8k"]["exact"] = generation.exact_match(replies[at][: len(numbers)], numbers)
            if self.problems is not None:
                judged = outcomes(replies[at][len(numbers) :], self.mixture.split)
                measures[at]["code"][PASSED] = 100 * judged.count("passed") / len(judged)
                replica["programs"] = "".join(outcome[0] for outcome in judged)
            if use is not None:
                replica["use"] = use[at]
            replica["mean"] = round(scoring.mixture_mean(measures[at]), 4)
            replica["measures"] = {name: {m: round(x, 4) for m, x in of.items()} for name, of in measures[at].items()}
            if trained.load is not None:
                replica["load"] = trained.load[at]
            replicas.append(replica)
        judging_seconds, wall_seconds = judging_watch.seconds, wall.seconds
        total, active = arms.parameters(settings, self.model.config)
        record: dict[str, Any] = {
            "run": dataclasses.asdict(run),
            "settings": arms.table(settings),
            "parameters": {"total": total, "active": active},
            "replicas": replicas,
            "history": trained.history,
            "identity": self.identity,
            "training_seconds": round(trained.seconds, 2),
            "scoring_seconds": round(scoring_seconds, 2),
            "decoding_seconds": round(decoding_seconds, 2),
            "judging_seconds": round(judging_seconds, 2),
            "compile_wait_seconds": round(compile_wait_seconds, 2),
            "wall_seconds": round(wall_seconds, 2),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "command": self.command,
        }
        return self.runs.add(run.name, record)

    def replies(self, programs: Programs, adapter: Any) -> list[list[str]]:
        """Greedy replies of every replica to the prompts of gsm8k and, if they are asked, the programs."""
        prompts, stops = self.prompts, self.mixture.stops
        tasks = np.full(len(prompts.lengths), SETS.index("code"), np.int32)
        tasks[: len(prompts.numbers)] = SETS.index("gsm8k")
        found = np.asarray(
            programs.greedy(
                self.model, adapter, prompts.tokens, prompts.lengths.astype(np.int32), tasks, np.array(stops, np.int32)
            )
        )
        cut = generation.until_stop(found, stops)
        if self.vocabulary is not None:
            cut = [[self.vocabulary[reply].tolist() for reply in of] for of in cut]
        return [self.tokenizer.decode_batch(of) for of in cut]


def bare(arm: str) -> Run:
    """Run of the backbone alone. It has as many replicas as a grid, whose programs it shares."""
    return Run(stage="bare", arm=arm, seeds=(0,) * 4, rates=(0.0,) * 4)


def grid(arm: str, rates: Sequence[float]) -> Run:
    return Run(stage="grid", arm=arm, seeds=(0,) * len(rates), rates=tuple(rates))


def of_seeds(arm: str, seeds: Sequence[int], records: Mapping[str, dict[str, Any]]) -> Run:
    """Run of several seeds at the arm's best learning rate. Raises `UserError` while its grid is not recorded."""
    best = best_rate(records, arm)
    require(best is not None, f"--arms {arm}: no learning rate of it is recorded; run its --stage grid first")
    assert best is not None
    return Run(stage="seeds", arm=arm, seeds=tuple(seeds), rates=(best,) * len(seeds))


def grid_of(records: Mapping[str, dict[str, Any]], arm: str) -> dict[float, dict[str, Any]]:
    """Learning rate → replica of the arm's grid, those that did not diverge, by rate."""
    found = {
        replica["learning_rate"]: replica
        for record in records.values()
        if record["run"]["stage"] == "grid" and record["run"]["arm"] == arm
        for replica in record["replicas"]
        if not replica["diverged"]
    }
    return dict(sorted(found.items()))


def best_rate(records: Mapping[str, dict[str, Any]], arm: str) -> float | None:
    """Learning rate with the best mean score, the smallest of equal ones; None before the grid."""
    found = grid_of(records, arm)
    return max(found, key=lambda rate: (found[rate]["mean"], -rate)) if found else None
