"""Several runs of one method trained together: the lanes, which differ in seed or in learning rate, are a leading axis.

    loss_s = Σ_t −log p(x_t | x_<t; θ_s) / #targets + c · balance(θ_s)
    θ_s ← θ_s − η_s · schedule(t) · Adam(clip(∇ loss_s))

θ_s is an adapter, or a whole backbone ("full"), in fp32; every leaf is stacked as [S, …]. Learning rates η [S], the schedule
and the balance coefficient c are operands, so that one program serves all data sets, learning rates and seeds of a method;
`compiled` makes it ahead of its use. A lane is trained on its own batches, in the order that its seed gives. A lane that
diverges does not disturb the others.

Tied experts and settled routers are those of `adafuse_jax.training.recipe`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.adapters.router import balance_loss, expert_load
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.packing import Rows
from adafuse_jax.models.attention import attention_of_lanes
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Routing
from adafuse_jax.training.schedules import Phases
from benchmarks.accuracy_data import Packed, targets_of
from benchmarks.accuracy_methods import SETTLED, TIED, USUAL, make_adapter

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
WARMUP, FINAL_SHARE = 0.05, 0.1
REMAT_ABOVE = 2000
"""Low-rank activations of a token and layer above which layers are recomputed in the backward pass, to save memory."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Parameters and Adam's moments of S runs."""

    params: Any
    moments: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRows:
    """Rows of every lane, and their targets as `targets_of` lists them."""

    tokens: Int[np.ndarray, "S B T"]
    positions: Int[np.ndarray, "S B T"]
    segment_ids: Int[np.ndarray, "S B T"]
    place: Int[np.ndarray, "S B K"]
    wanted: Int[np.ndarray, "S B K"]
    there: Bool[np.ndarray, "S B K"]


def start(settings: dict[str, Any], model: Backbone, seeds: Sequence[int]) -> Lanes:
    """One lane per seed."""
    return _start(jnp.array(seeds), model, tuple(settings.items()))


@partial(jax.jit, static_argnames="settings")
def _start(seeds: Int[Array, " S"], model: Backbone, settings: tuple[tuple[str, Any], ...]) -> Lanes:
    table = dict(settings)

    def one(seed: Array) -> Lanes:
        if table["adapter"] == "full":
            params: Any = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
        else:
            params = make_adapter(table, model.config, jax.random.key(seed))
        params = recipe_of(table, steps=1).initial(params)
        return Lanes(params=params, moments=OPTIMIZER.init(params))

    return jax.vmap(one)(seeds)


def recipe_of(settings: dict[str, Any], steps: int) -> Phases:
    """Of a run of so many steps."""
    table = USUAL | settings
    return Phases.of(table[TIED], table[SETTLED], steps)


def acting(model: Backbone, params: Any) -> tuple[Backbone, Any]:
    """(backbone, adapter) that parameters stand for."""
    if isinstance(params, Backbone):
        return jax.tree.map(lambda leaf: leaf.astype(model.dtype), params), None
    return model, params


def is_pregated(routing: Any) -> bool:
    """Whether a routing is one decision per token for the whole model: experts [B, T, k]."""
    return isinstance(routing, Routing) and routing.experts.ndim == 3


def _balance(params: Any, routing: Any, real: Array) -> Array:
    if routing is None:
        return jnp.float32(0)
    own = getattr(params, "balance_loss", None)  # of a method with routers in every layer
    return balance_loss(routing, real) if own is None else own(routing, real)


@partial(jax.jit, static_argnames="remat", donate_argnames="lanes")
def step(
    lanes: Lanes,
    model: Backbone,
    batch: LaneRows,
    rates: Float[Array, " S"],
    balance: Float[Array, ""],
    at: Int[Array, ""],
    recipe: Phases,
    *,
    remat: bool,
) -> tuple[Lanes, dict[str, Array]]:
    """One optimiser step of every lane on its own batch. Metrics are [S], `load` [S, E] with AdaFuse. `at`: how many
    steps came before."""

    def one(lane: Lanes, batch: Any, rate: Array) -> tuple[Lanes, dict[str, Array]]:
        real = batch.segment_ids > 0

        def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
            backbone, adapter = acting(model, params)
            out = backbone.run(
                batch.tokens, adapter=adapter, positions=batch.positions, segment_ids=batch.segment_ids, remat=remat,
                attention=attention_of_lanes,
            )  # fmt: skip
            losses = losses_at(backbone, out.hidden, batch.place, batch.wanted)
            loss = jnp.sum(losses * batch.there) / jnp.maximum(batch.there.sum(), 1)
            metrics = {"loss": loss}
            if is_pregated(out.routing):
                metrics["load"] = expert_load(out.routing, real)[0]
            return loss + balance * _balance(params, out.routing, real), metrics

        grads, metrics = jax.grad(loss_of, has_aux=True)(lane.params)
        updates, moments = OPTIMIZER.update(recipe.gradients(grads, at), lane.moments, lane.params)
        params = jax.tree.map(lambda p, u: p - rate * u, lane.params, recipe.updates(updates, at))
        return Lanes(params=params, moments=moments), metrics

    return jax.vmap(one)(lanes, batch, rates)


def losses_at(
    backbone: Backbone, hidden: Float[Array, "B T D"], place: Int[Array, "B K"], wanted: Int[Array, "B K"]
) -> Float[Array, "B K"]:
    """−log p of `wanted` after the tokens at `place`, in nats; no other logits are made."""
    hidden = jnp.take_along_axis(hidden, place[..., None], axis=1)  # [B, K, D]
    return optax.softmax_cross_entropy_with_integer_labels(backbone.logits(hidden), wanted)


def low_rank_activations(settings: dict[str, Any]) -> int:
    """Numbers that the experts of a layer make for a token: E · R in every place."""
    experts = max(settings.get("experts_per_layer", (settings.get("num_experts", 1),)))
    return experts * settings.get("rank", 0) * len(settings.get("targets", ("ffn",)))


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """`seconds` are those of all steps of all lanes, without the first step, which compiles; `history` holds, every so many
    steps, the mean loss of each lane (None if it is not finite) and the load of each expert in lane 0."""

    lanes: Lanes
    steps: int
    tokens: int
    seconds: float
    first_step_seconds: float
    history: list[dict[str, Any]]

    @property
    def diverged(self) -> list[bool]:
        """Whether the loss of each lane was ever not finite."""
        return [any(loss is None for loss in losses) for losses in zip(*(p["loss"] for p in self.history), strict=True)]


def train(
    settings: dict[str, Any],
    model: Backbone,
    rows: Rows,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    epochs: float,
    batch_size: int,
    programs: Programs | None = None,
) -> Trained:
    """Lane s starts from seed s, sees the rows in the order of seed s, and has learning rate s. `tokens` counts lane 0's.
    `programs` are those of `compiled`; None compiles now."""
    programs = programs or jitted(settings)
    lanes = programs.start(jnp.array(seeds), model)
    place, wanted, there = targets_of(rows)
    orders = [Batches(rows=(rows,), seed=seed, batch_size=batch_size) for seed in seeds]
    steps = max(1, math.ceil(epochs * orders[0].steps_per_epoch))
    peak = np.array(rates, np.float32)
    balance = jnp.float32(settings.get("balance_coefficient", 0.0))
    recipe = recipe_of(settings, steps)
    every, history, tokens = max(1, steps // 40), [], 0
    window: list[Array] = []
    begun = first = time.perf_counter()
    for at in range(steps):
        drawn = np.stack([order.locate(at * batch_size + np.arange(batch_size))[1] for order in orders])  # [S, B]
        batch = LaneRows(
            tokens=rows.tokens[drawn], positions=rows.positions[drawn], segment_ids=rows.segment_ids[drawn],
            place=place[drawn], wanted=wanted[drawn], there=there[drawn],
        )  # fmt: skip
        rate = peak * np.float32(schedule(at, steps))
        lanes, metrics = programs.step(lanes, model, batch, rate, balance, np.int32(at), recipe)
        tokens += int((batch.segment_ids[0] > 0).sum())
        window.append(metrics["loss"])
        if at == 0:
            jax.block_until_ready(metrics)
            first = time.perf_counter()
        if (at + 1) % every == 0 or at + 1 == steps:
            losses = [float(x) if np.isfinite(x) else None for x in np.mean(jax.device_get(window), axis=0)]
            window.clear()
            load = np.asarray(metrics["load"][0]).tolist() if "load" in metrics else None
            history.append({"step": at + 1, "loss": losses, "load": load})
    jax.block_until_ready(lanes)
    return Trained(
        lanes=lanes, steps=steps, tokens=tokens, seconds=time.perf_counter() - first,
        first_step_seconds=first - begun, history=history,
    )  # fmt: skip


@jax.jit
def target_losses(
    model: Backbone,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    place: Int[Array, "B K"],
    wanted: Int[Array, "B K"],
) -> Float[Array, "S B K"]:
    """−log p of the targets of packed rows under every lane, in nats. `params` None is the bare backbone, S = 1."""

    def one(params: Any) -> Array:
        backbone, adapter = acting(model, params)
        out = backbone.run(
            tokens, adapter=adapter, positions=positions, segment_ids=segment_ids, attention=attention_of_lanes
        )
        return losses_at(backbone, out.hidden, place, wanted)

    return one(None)[None] if params is None else jax.vmap(one)(params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What a method runs: start(seeds, model), step(lanes, model, batch, rates, balance, at, recipe), and losses as
    `target_losses`."""

    start: Callable[..., Lanes]
    step: Callable[..., tuple[Lanes, dict[str, Array]]]
    losses: Callable[..., Array]


def jitted(settings: dict[str, Any]) -> Programs:
    """Programs that compile when they are called first."""
    begin = partial(_start, settings=tuple(settings.items()))
    return Programs(start=begin, step=partial(step, remat=needs_remat(settings)), losses=target_losses)


def needs_remat(settings: dict[str, Any]) -> bool:
    return low_rank_activations(settings) > REMAT_ABOVE


def compiled(
    settings: dict[str, Any], model: Backbone, *, lanes: int, batch_size: int, scored: int, length: int, targets: int
) -> Programs:
    """Programs for `lanes` lanes, `batch_size` rows a step with K = `targets`, and `scored` rows that are scored together.
    May be called in several threads."""

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    table = tuple(settings.items())
    begin = _start.lower(integers(lanes), model, table).compile()
    state = jax.eval_shape(partial(_start, settings=table), integers(lanes), model)
    row, target = integers(lanes, batch_size, length), integers(lanes, batch_size, targets)
    there: Any = jax.ShapeDtypeStruct(target.shape, jnp.bool_)
    batch = LaneRows(tokens=row, positions=row, segment_ids=row, place=target, wanted=target, there=there)
    rates, balance = jax.ShapeDtypeStruct((lanes,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    recipe = jax.tree.map(lambda _: integers(), recipe_of(settings, steps=1))
    optimiser_step = step.lower(
        state, model, batch, rates, balance, integers(), recipe, remat=needs_remat(settings)
    ).compile()
    rows, wanted = integers(scored, length), integers(scored, length // 4)
    losses = target_losses.lower(model, state.params, rows, rows, rows, wanted, wanted).compile()
    return Programs(start=begin, step=optimiser_step, losses=losses)


def accuracies(
    model: Backbone, params: Any, packed: Packed, *, batch_size: int, losses_of: Callable[..., Array] = target_losses
) -> list[float]:
    """Share of questions that each lane answers right: the candidate with the largest log-likelihood is the answer."""
    parts = []
    for at in range(0, len(packed.tokens), batch_size):
        rows = slice(at, at + batch_size)
        arrays = (packed.tokens, packed.positions, packed.segment_ids, packed.place, packed.wanted)
        parts.append(losses_of(model, params, *(array[rows] for array in arrays)))
    losses = np.concatenate(jax.device_get(parts), axis=1)  # [S, N, K]
    there = packed.owner >= 0
    result = []
    for lane in losses:
        sums = np.zeros(sum(packed.choices))
        np.add.at(sums, packed.owner[there], lane[there])
        result.append(packed.accuracy(sums))
    return result


@partial(jax.jit, static_argnames="num_classes")
def class_loads(
    model: Backbone, adapter: Any, tokens: Array, positions: Array, segment_ids: Array, classes: Array, num_classes: int
) -> Float[Array, "C E"]:
    """How often tokens of each class use each expert; classes [V] gives every token's, which segment 0 has none of."""
    routing = model.run(tokens, adapter=adapter, positions=positions, segment_ids=segment_ids).routing
    used = jax.nn.one_hot(routing.experts, routing.probabilities.shape[-1]).sum(-2)  # [B, T, E]
    kind = jax.nn.one_hot(classes[tokens], num_classes) * (segment_ids > 0)[..., None]  # [B, T, C]
    return jnp.einsum("btc,bte->ce", kind, used)


def expert_use(
    model: Backbone, lanes: Lanes, packed: Packed, classes: Int[Array, " V"], num_classes: int, *, batch_size: int
) -> np.ndarray:
    """`class_loads` of lane 0 over all rows, [C, E] counts."""
    adapter = jax.tree.map(lambda leaf: leaf[0], lanes.params)
    total = np.zeros(())
    for at in range(0, len(packed.tokens), batch_size):
        rows = slice(at, at + batch_size)
        arrays = (packed.tokens[rows], packed.positions[rows], packed.segment_ids[rows])
        total = total + np.asarray(class_loads(model, adapter, *arrays, classes, num_classes))
    return total


def trainable_parameters(settings: dict[str, Any], model: Backbone) -> int:
    """Of one lane; experts that a layer of MoLA lacks are not counted."""
    if settings["adapter"] == "none":
        return 0
    if settings["adapter"] == "full":
        return sum(leaf.size for leaf in jax.tree.leaves(model))
    adapter = jax.eval_shape(lambda: make_adapter(settings, model.config, jax.random.key(0)))
    leaves = jax.tree.leaves(adapter)
    parts = settings.get("experts_per_layer")
    if parts is None:
        return sum(math.prod(leaf.shape) for leaf in leaves)
    layers = model.config.num_layers  # all leaves are [L, E, …]
    present = sum(parts[layer * len(parts) // layers] for layer in range(layers))
    return sum(math.prod(leaf.shape[2:]) * present for leaf in leaves)
