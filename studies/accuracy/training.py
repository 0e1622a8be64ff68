"""Several runs of one arm trained together, as `benchmarks.accuracy_training` does: replicas, a leading axis S of all
leaves, that differ in seed or learning rate. Here an example counts the same whatever its length, an adapter may plan its
routing from the tokens, and its parameters may have learning rates of their own.

    loss_s = Σ_examples (mean loss of its targets) / #examples + c · balance(θ_s)
    θ_s ← θ_s − η_s · schedule(t) · m_θ · Adam(clip(∇ loss_s))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from adafuse_jax.adapters.router import expert_load
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.packing import Rows
from adafuse_jax.models.attention import attention_of_lanes
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.schedules import Phases
from benchmarks.accuracy_training import OPTIMIZER, is_pregated, losses_at, recipe_of, schedule
from benchmarks.accuracy_training import Lanes as Replicas
from studies.accuracy.arms import make_adapter
from studies.accuracy.mixture import Training
from studies.accuracy.pregated import PreGated

POINTS = 20
"""How often a run's loss is recorded."""

Settings = tuple[tuple[str, Any], ...]


def seen(
    params: Any, model: Backbone, tokens: Array, positions: Array, tasks: Array, **options: Any
) -> tuple[Any, Array | None]:
    """(adapter for one run over these tokens, context after every token or None)."""
    if not isinstance(params, PreGated):
        return params, None
    routing, context = params.plan(model, tokens, positions, tasks, **options)
    return params.bound(routing), context


@partial(jax.jit, static_argnames="settings")
def start(seeds: Int[Array, " S"], model: Backbone, settings: Settings) -> Replicas:
    """One replica per seed."""
    table = dict(settings)

    def one(seed: Array) -> Replicas:
        params = recipe_of(table, steps=1).initial(make_adapter(table, model.config, jax.random.key(seed)))
        return Replicas(params=params, moments=OPTIMIZER.init(params))

    return jax.vmap(one)(seeds)


@partial(jax.jit, donate_argnames="replicas")
def step(
    replicas: Replicas,
    model: Backbone,
    rows: Training,
    drawn: Int[Array, "S B"],
    rates: Float[Array, " S"],
    keys: Key[Array, " S"],
    balance: Float[Array, ""],
    at: Int[Array, ""],
    recipe: Phases,
) -> tuple[Replicas, dict[str, Array]]:
    """One optimiser step of every replica on its rows `drawn`. Metrics are [S], `load` [S, E] where one router decides."""

    def one(replica: Replicas, drawn: Array, rate: Array, key: Array) -> tuple[Replicas, dict[str, Array]]:
        batch = jax.tree.map(lambda leaf: leaf[drawn], rows)
        real = batch.segment_ids > 0

        def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
            adapter, _ = seen(
                params, model, batch.tokens, batch.positions, batch.tasks, key=jax.random.fold_in(key, at)
            )
            out = model.run(
                batch.tokens, adapter=adapter, positions=batch.positions, segment_ids=batch.segment_ids,
                attention=attention_of_lanes,
            )  # fmt: skip
            losses = losses_at(model, out.hidden, batch.place, batch.wanted)
            loss = jnp.sum(losses * batch.weight) / jnp.maximum(batch.weight.sum(), 1)
            metrics = {"loss": loss}
            if is_pregated(out.routing):
                metrics["load"] = expert_load(out.routing, real)[0]
            own = getattr(params, "balance_loss", None)
            return loss if own is None else loss + balance * own(out.routing, real), metrics

        grads, metrics = jax.grad(loss_of, has_aux=True)(replica.params)
        updates, moments = OPTIMIZER.update(recipe.gradients(grads, at), replica.moments, replica.params)
        updates = recipe.updates(updates, at)
        if isinstance(replica.params, PreGated):
            updates = jax.tree.map(lambda own, update: own * update, replica.params.rates(), updates)
        params = jax.tree.map(lambda p, u: p - rate * u, replica.params, updates)
        return Replicas(params=params, moments=moments), metrics

    return jax.vmap(one)(replicas, drawn, rates, keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """`seconds` are of all steps of all replicas but the first step; `history` has the mean loss of each replica (None if
    it is not finite) POINTS times."""

    params: Any
    seconds: float
    history: list[dict[str, Any]]
    load: list[list[float]] | None
    """Share of the assignments that each expert had in the last step, [S, E]."""

    @property
    def diverged(self) -> list[bool]:
        return [any(loss is None for loss in losses) for losses in zip(*(p["loss"] for p in self.history), strict=True)]


def train(
    settings: dict[str, Any],
    model: Backbone,
    rows: Training,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    steps: int,
    batch_size: int,
    begin: Callable[..., Replicas] | None = None,
    advance: Callable[..., tuple[Replicas, dict[str, Array]]] | None = None,
) -> Trained:
    """Replica s starts from seed s, sees the rows in the order of seed s, and has learning rate s. `rows` are on the
    device. `begin` and `advance` are `start` and `step` compiled ahead."""
    replicas = begin(jnp.array(seeds), model) if begin else start(jnp.array(seeds), model, tuple(settings.items()))
    advance = advance or step
    orders = [_order(len(rows.tokens), seed, batch_size) for seed in seeds]
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    peak, recipe = np.array(rates, np.float32), recipe_of(settings, steps)
    balance = jnp.float32(settings.get("balance_coefficient", 0.0))
    every, history, window = max(1, steps // POINTS), [], []
    begun = time.perf_counter()
    for at in range(steps):
        drawn = np.stack([order.locate(at * batch_size + np.arange(batch_size))[1] for order in orders])  # [S, B]
        rate = peak * np.float32(schedule(at, steps))
        replicas, metrics = advance(
            replicas, model, rows, drawn.astype(np.int32), rate, keys, balance, np.int32(at), recipe
        )
        window.append(metrics["loss"])
        if at == 0:
            jax.block_until_ready(metrics)
            begun = time.perf_counter()
        if (at + 1) % every == 0 or at + 1 == steps:
            means = np.mean(jax.device_get(window), axis=0)
            history.append({"step": at + 1, "loss": [round(float(x), 5) if np.isfinite(x) else None for x in means]})
            window.clear()
    jax.block_until_ready(replicas)
    load = np.round(np.asarray(metrics["load"]), 4).tolist() if "load" in metrics else None
    return Trained(params=replicas.params, seconds=time.perf_counter() - begun, history=history, load=load)


def _order(count: int, seed: int, batch_size: int) -> Batches:
    """The order of `count` rows; their contents are not looked at."""
    nothing = np.zeros((count, 1), np.int32)
    return Batches(rows=(Rows(nothing, nothing.astype(bool), nothing, nothing),), seed=seed, batch_size=batch_size)


def on_device(rows: Training) -> Training:
    return jax.tree.map(jnp.asarray, rows)


def shapes(
    settings: dict[str, Any], model: Backbone, rows: Training, *, replicas: int, batch_size: int
) -> dict[str, Any]:
    """Arguments of `start` and `step` as shapes, to compile them ahead."""
    seeds = jax.ShapeDtypeStruct((replicas,), jnp.int32)
    table = tuple(settings.items())
    state = jax.eval_shape(partial(start, settings=table), seeds, model)
    keys = jax.eval_shape(jax.vmap(jax.random.key), seeds)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    recipe = jax.tree.map(lambda _: scalar, recipe_of(settings, steps=1))
    drawn = jax.ShapeDtypeStruct((replicas, batch_size), jnp.int32)
    rates, balance = jax.ShapeDtypeStruct((replicas,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    return {
        "start": (seeds, model, table),
        "step": (state, model, rows, drawn, rates, keys, balance, scalar, recipe),
    }
