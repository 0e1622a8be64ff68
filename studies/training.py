"""A method of a study, trained as replicas (`adafuse_jax.training.replicas`) by the product's `train_step`.

Learning rates warm up over a twentieth of the steps and fall by a cosine to a tenth; gradients are clipped to norm 1. A
replica starts from its seed, sees the rows in the order of its seed, and has a learning rate of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.packing import Rows
from adafuse_jax.models.config import Remat
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.optimizer import make_optimizer
from adafuse_jax.training.replicas import initial_replicas, replica_forward, replicas_step, with_rate
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import TrainState
from benchmarks.common.timing import Stopwatch, wait

TIED, SETTLED = "tied", "settled"
"""Settings of a method that are the training's and not the adapter's, by their names in the records: the share of the steps
with expert weight tying, and the share after which routers are frozen."""
USUAL: dict[str, Any] = {TIED: 0.0, SETTLED: 1.0}
"""Defaults of both, for methods without their own."""
CONFIG = TrainConfig(
    model="model", dataset=("data",), output="runs", learning_rate=1.0, warmup_ratio=0.05, min_lr_ratio=0.1
)
"""The optimizer's settings; a peak of 1, as every replica has its own."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Rows of tokens, N of a study or those of a batch; a pytree."""

    tokens: Int[np.ndarray, "*N T"]
    positions: Int[np.ndarray, "*N T"]
    segment_ids: Int[np.ndarray, "*N T"]
    loss_mask: Bool[np.ndarray, "*N T"] | Float[np.ndarray, "*N T"] | None = None
    """Targets, or their weights; None where no loss is taken."""
    tasks: Int[np.ndarray, "*N T"] | None = None
    """The data set of every token, where an adapter asks for it."""
    prompts: Bool[np.ndarray, "*N T"] | None = None
    """True in the part of a text before its first target, where an adapter asks for it."""

    @classmethod
    def of(cls, rows: Rows) -> Texts:
        return cls(tokens=rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids, loss_mask=rows.loss_mask)


def phases_of(settings: dict[str, Any], steps: int) -> Phases:
    """Phases (tied experts, frozen router) of a run of `steps` steps."""
    table = USUAL | settings
    return Phases.of(table[TIED], table[SETTLED], steps)


@cache
def optimizer_of(steps: int, *more: optax.GradientTransformation) -> optax.GradientTransformation:
    """AdamW of CONFIG, then `more`, then each replica's rate; the same object for the same arguments, as programs are."""
    return with_rate(optax.chain(make_optimizer(CONFIG, steps), *more))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Replicas after their last step."""

    adapter: Any
    """Adapter of all replicas: every leaf is [S, …]."""
    tokens: int
    """Number of tokens that the first replica was trained on."""
    seconds: float
    """Duration of all steps of all replicas but the first step, which compiles."""
    first_step_seconds: float
    history: list[dict[str, Any]]
    """History, one entry per logging interval: mean loss of each replica over it (None if not finite), and the first
    replica's expert load."""
    load: list[list[float]] | None
    """Share of the assignments that each expert had in the last step, [S, E]; None without one router."""

    @property
    def diverged(self) -> list[bool]:
        """True for each replica whose loss was not finite at some time."""
        replicas = len(jax.tree.leaves(self.adapter)[0])
        return [any(point["loss"][replica] is None for point in self.history) for replica in range(replicas)]


class Trainer:
    """Trainer of replicas of one method for `steps` steps.

    Args:
      make: (backbone, key) → what trains, at its initial values.
      optimizer: of `optimizer_of`.
      phases: of `phases_of`.
      forward: the method's pass over rows, as `train_step` takes it, with `replica_attention`.
      remat: what the backward pass computes again, see `adafuse_jax.models.remat`.
    """

    def __init__(
        self,
        make: Callable[[Backbone, Key[Array, ""]], Any],
        *,
        steps: int,
        optimizer: optax.GradientTransformation,
        phases: Phases,
        forward: Callable[..., Any] = replica_forward,
        remat: Remat = "none",
    ):
        self.make, self.steps, self.optimizer, self.phases = make, steps, optimizer, phases
        self.start: Callable[..., TrainState] = jax.jit(self._start)
        self.step = partial(replicas_step, optimizer=optimizer, remat=remat, phases=phases, forward=forward)
        self._options = {"optimizer": optimizer, "remat": remat, "forward": forward}

    def _start(self, model: Backbone, seeds: Int[Array, " S"], rates: Float[Array, " S"]) -> TrainState:
        def initial(key: Key[Array, ""]) -> TrainState:
            adapter = self.phases.initial(self.make(model, key))
            return TrainState(step=jnp.int32(0), adapter=adapter, moments=self.optimizer.init(adapter), key=key)

        return initial_replicas(initial, seeds, rates)

    def compile(self, model: Backbone, rows: Texts, *, replicas: int, batch_size: int) -> TrainState:
        """Compile the programs ahead of their use, for batches of `rows`; in any thread. Returns the states as shapes."""
        seeds, rates = (jax.ShapeDtypeStruct((replicas,), kind) for kind in (jnp.int32, jnp.float32))
        states = jax.eval_shape(self._start, model, seeds, rates)
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((replicas, 1, batch_size, *leaf.shape[1:]), leaf.dtype), rows
        )
        self.start = jax.jit(self._start).lower(model, seeds, rates).compile()
        step = replicas_step.lower(states, model, batch, phases=self.phases, **self._options).compile()
        self.step = partial(step, phases=self.phases)
        return states

    def train(
        self,
        model: Backbone,
        rows: Texts,
        *,
        seeds: Sequence[int],
        rates: Sequence[float],
        batch_size: int,
        points: int,
        steps: int | None = None,
    ) -> Trained:
        """Replica s starts from seed s, sees the rows in the order of seed s, and has learning rate s. The history has about
        `points` points. `steps`: end after as many, None for all."""
        states = self.start(model, np.array(seeds, np.int32), np.array(rates, np.float32))
        orders = [_order(len(rows.tokens), seed, batch_size) for seed in seeds]
        every, history, window, tokens = max(1, self.steps // points), [], [], 0
        one_router = isinstance(states.adapter, AdaFuse)
        watch, first_step_seconds = Stopwatch(), 0.0
        metrics: dict[str, Any] = {}
        for at in range(self.steps if steps is None else steps):
            drawn = np.stack([order.locate(at * batch_size + np.arange(batch_size))[1] for order in orders])  # [S, B]
            batch = jax.tree.map(lambda leaf, drawn=drawn: leaf[drawn][:, None], rows)  # [S, 1, B, T]
            states, metrics = self.step(states, model, batch)
            tokens += int((batch.segment_ids[0] > 0).sum())
            window.append(metrics["loss"])
            if at == 0:
                wait(metrics)
                first_step_seconds = watch.seconds
            if (at + 1) % every == 0 or at + 1 == self.steps:
                means = np.mean(jax.device_get(window), axis=0)
                losses = [round(float(x), 5) if np.isfinite(x) else None for x in means]
                load = np.asarray(metrics["load"][0]).tolist() if one_router else None
                history.append({"step": at + 1, "loss": losses, "load": load})
                window.clear()
        wait(states)
        return Trained(
            adapter=states.adapter,
            tokens=tokens,
            seconds=watch.seconds - first_step_seconds,
            first_step_seconds=first_step_seconds,
            history=history,
            load=np.round(np.asarray(metrics["load"]), 4).tolist() if one_router and metrics else None,
        )


def _order(count: int, seed: int, batch_size: int) -> Batches:
    """The order of `count` rows; their contents are not looked at."""
    nothing = np.zeros((count, 1), np.int32)
    return Batches(rows=(Rows(nothing, nothing.astype(bool), nothing, nothing),), seed=seed, batch_size=batch_size)
