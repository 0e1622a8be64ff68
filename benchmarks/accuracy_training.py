"""Several runs of one method trained together: the lanes, which differ in seed or in learning rate, are a leading axis.

    loss_s = Σ_t −log p(x_t | x_<t; θ_s) / #targets + c · balance(θ_s)
    θ_s ← θ_s − η_s · schedule(t) · Adam(clip(∇ loss_s))

θ_s is an adapter, or a whole backbone ("full"), in fp32; every leaf is stacked as [S, …]. Learning rates η [S], the schedule
and the balance coefficient c are operands, so that one program serves all data sets, learning rates and seeds of a method. A
lane is trained on its own batches, in the order that its seed gives. A lane that diverges does not disturb the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from adafuse_jax.adapters.router import Routing, balance_loss, expert_load
from adafuse_jax.data.batches import Batch, Batches
from adafuse_jax.data.packing import Rows
from adafuse_jax.model.backbone import Backbone
from adafuse_jax.training.step import token_losses
from benchmarks.accuracy_data import Packed
from benchmarks.accuracy_methods import make_adapter

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
        return Lanes(params=params, moments=OPTIMIZER.init(params))

    return jax.vmap(one)(seeds)


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
    lanes: Lanes, model: Backbone, batch: Batch, rates: Float[Array, " S"], balance: Float[Array, ""], *, remat: bool
) -> tuple[Lanes, dict[str, Array]]:
    """One optimiser step of every lane on its own batch, arrays [S, B, T]. Metrics are [S], `load` [S, E] with AdaFuse."""

    def one(lane: Lanes, batch: Any, rate: Array) -> tuple[Lanes, dict[str, Array]]:
        real = batch.segment_ids > 0

        def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
            backbone, adapter = acting(model, params)
            out = backbone.run(
                batch.tokens, adapter=adapter, positions=batch.positions, segment_ids=batch.segment_ids, remat=remat
            )
            losses = token_losses(backbone, out.hidden, batch.tokens, batch.loss_mask)
            loss = losses.sum() / jnp.maximum(batch.loss_mask[:, 1:].sum(), 1)
            metrics = {"loss": loss}
            if is_pregated(out.routing):
                metrics["load"] = expert_load(out.routing, real)[0]
            return loss + balance * _balance(params, out.routing, real), metrics

        grads, metrics = jax.grad(loss_of, has_aux=True)(lane.params)
        updates, moments = OPTIMIZER.update(grads, lane.moments, lane.params)
        params = jax.tree.map(lambda p, u: p - rate * u, lane.params, updates)
        return Lanes(params=params, moments=moments), metrics

    return jax.vmap(one)(lanes, batch, rates)


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
) -> Trained:
    """Lane s starts from seed s, sees the rows in the order of seed s, and has learning rate s. `tokens` counts lane 0's."""
    lanes = start(settings, model, seeds)
    orders = [Batches(rows=(rows,), seed=seed, batch_size=batch_size) for seed in seeds]
    steps = max(1, math.ceil(epochs * orders[0].steps_per_epoch))
    peak = np.array(rates, np.float32)
    balance = jnp.float32(settings.get("balance_coefficient", 0.0))
    remat = low_rank_activations(settings) > REMAT_ABOVE
    every, history, tokens = max(1, steps // 40), [], 0
    window: list[np.ndarray] = []
    begun = first = time.perf_counter()
    for at in range(steps):
        parts = [order.at(at) for order in orders]
        batch = Batch(**{f.name: np.stack([getattr(part, f.name)[0] for part in parts]) for f in fields(Batch)})
        lanes, metrics = step(lanes, model, batch, peak * schedule(at, steps), balance, remat=remat)
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
    model: Backbone, params: Any, tokens: Array, positions: Array, segment_ids: Array, target: Int[Array, "B K"]
) -> Float[Array, "S B K"]:
    """−log p of the targets of packed rows under every lane, in nats. `params` None is the bare backbone, S = 1."""

    def one(params: Any) -> Array:
        backbone, adapter = acting(model, params)
        out = backbone.run(tokens, adapter=adapter, positions=positions, segment_ids=segment_ids)
        hidden = jnp.take_along_axis(out.hidden, target[..., None] - 1, axis=1)  # [B, K, D]
        wanted = jnp.take_along_axis(tokens, target, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(backbone.logits(hidden), wanted)

    return one(None)[None] if params is None else jax.vmap(one)(params)


def accuracies(model: Backbone, params: Any, packed: Packed, *, batch_size: int) -> list[float]:
    """Share of questions that each lane answers right: the candidate with the largest log-likelihood is the answer."""
    parts = []
    for at in range(0, len(packed.tokens), batch_size):
        rows = slice(at, at + batch_size)
        arrays = (packed.tokens, packed.positions, packed.segment_ids, packed.target)
        parts.append(target_losses(model, params, *(array[rows] for array in arrays)))
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
