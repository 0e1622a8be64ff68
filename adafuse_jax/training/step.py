"""One optimiser step: token cross-entropy + balance loss over A micro-batches, then AdamW. The backbone is frozen, unless it
is what trains.

loss = Σ_t −log p(x_t | x_<t) / #targets + c · E·Σ_e f_e·P_e

f_e, the share of the assignments, has no gradient. AdaFuse's one router stands in layer 0, so f over all tokens of the step
is computed before the micro-batches; P is a mean over tokens, so their gradients add up to those of one large batch. Routers
of the layer-wise methods see the outputs of the layers before: their f is of each micro-batch, so --grad-accum changes their
loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from adafuse_jax.adapters.adafuse import AdaFuse, Products
from adafuse_jax.adapters.baselines.full import FullWeights
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.registry import AnyAdapter, resolve_forward
from adafuse_jax.adapters.router import expert_load, router_statistics
from adafuse_jax.data.batches import Batch
from adafuse_jax.models.config import Remat
from adafuse_jax.models.decoder import Backbone, Output
from adafuse_jax.models.layout import ONE_DEVICE, Layout
from adafuse_jax.models.loss import token_losses
from adafuse_jax.training.schedules import Phases

ONE_PHASE = Phases()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """All that changes while training: the adapter, or with `full` the backbone in its place. It and its two moments are
    fp32."""

    step: Int[Array, ""]
    adapter: AnyAdapter | FullWeights
    moments: optax.OptState
    key: Key[Array, ""]


def forward(
    trained: AnyAdapter | FullWeights | None,
    model: Backbone,
    batch: Any,
    *,
    key: Key[Array, ""] | None = None,
    products: Products = "dense",
    **options: Any,
) -> tuple[Backbone, Output]:
    """A pass over rows [B, T]: the backbone that ran, whose head gives the logits, and its output. `key` is the randomness
    of dropout, `products` see `AdaFuse`; `options` are those of `Backbone.run`."""
    backbone, adapter = resolve_forward(trained, model)
    if isinstance(adapter, AdaFuse):
        adapter = adapter.with_products(products)
    out = backbone.run(
        batch.tokens,
        adapter=adapter,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        dropout_key=key if trained is not None and trained.config.dropout else None,
        **options,
    )
    return backbone, out


@cache
def forward_with(products: Products) -> Callable[..., tuple[Backbone, Output]]:
    """`forward` with those products; one object for each, as programs are compiled for it."""
    return forward if products == "dense" else partial(forward, products=products)


def load_of_step(
    model: Backbone, adapter: AdaFuse, batch: Batch, forward: Callable[..., Any] = forward, **options: Any
) -> Float[Array, " E"]:
    """f over all micro-batches of [A, B, T] arrays, from a pass through layer 0 as far as the router; the rest is dead code
    to XLA. Of a step of stories260K on two CPU cores it takes 0.04%, or 2.4% if the first target is in the FFN."""
    first = jax.tree.map(lambda leaf: leaf, model)
    first.layers, experts = jax.tree.map(lambda leaf: leaf[:1], (model.layers, adapter.experts))
    first.config = dataclasses.replace(model.config, num_layers=1, sliding_windows=model.config.sliding_windows[:1])
    only = jax.tree.map(lambda leaf: leaf, adapter)
    only.experts = experts

    def add_micro(total: Array, micro: Any) -> tuple[Array, None]:
        _, out = forward(only, first, micro, unroll=True, **options)
        real = micro.segment_ids > 0
        return total + real.sum() * expert_load(out.routing, real)[0], None

    total, _ = jax.lax.scan(add_micro, jnp.zeros(adapter.config.num_experts), batch)
    return total / jnp.maximum((batch.segment_ids > 0).sum(), 1)


@partial(
    jax.jit,
    static_argnames=("optimizer", "remat", "unroll", "max_segments", "forward", "layout"),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    model: Backbone,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    remat: Remat = "none",
    unroll: bool = False,
    max_segments: int | None = None,
    phases: Phases = ONE_PHASE,
    forward: Callable[..., tuple[Backbone, Output]] = forward,
    layout: Layout = ONE_DEVICE,
) -> tuple[TrainState, dict[str, Array]]:
    """One step over a batch of [A, B, T] arrays: gradients of all A micro-batches, normalised by all their targets, so that
    A × B may be split in any way (but for the layer-wise methods' balance loss, and for dropout, which draws another mask in
    each micro-batch). Balance loss and statistics are means over the micro-batches, weighted by their tokens.

    `loss_mask` may hold weights of the targets instead; the loss is then their weighted mean. `forward` may be another
    function that is called like the one above. `layout` is that of state, model and batch over devices.

    Returns the new state (the old one is donated) and the metrics of the step: `loss` (nats per target), `tokens`,
    `grad_norm`, and where there are routers their `balance` (the method's balance loss), `load` [E], `entropy` and `pair`
    [E, E].
    """
    targets = jnp.maximum(batch.loss_mask[..., 1:].sum(), 1)
    tokens = jnp.maximum((batch.segment_ids > 0).sum(), 1)
    key, dropout_key = jax.random.split(state.key)
    config = state.adapter.config
    is_split = len(batch.tokens) > 1
    options: Any = {"max_segments": max_segments, "layout": layout}
    load = None
    if is_split and isinstance(state.adapter, AdaFuse):
        load = load_of_step(model, state.adapter, batch, forward, **options)

    def micro_loss(trained: AnyAdapter | FullWeights, micro: Any, index: Array) -> tuple[Array, dict[str, Array]]:
        key = jax.random.fold_in(dropout_key, index)
        backbone, out = forward(trained, model, micro, key=key, remat=remat, unroll=unroll, **options)
        real = micro.segment_ids > 0
        loss = token_losses(backbone, out.hidden, micro.tokens, micro.loss_mask, layout).sum() / targets
        if isinstance(trained, LoRA | FullWeights):  # no router
            return loss, {"loss": loss}
        share = real.sum() / tokens
        if isinstance(trained, AdaFuse):
            balance = share * trained.balance_loss(out.routing, real, load)
        else:
            balance = share * trained.balance_loss(out.routing, real)
        statistics = jax.tree.map(lambda x: share * x, router_statistics(out.routing, real))
        return loss + config.balance_coefficient * balance, {"loss": loss, "balance": balance, **statistics}

    gradient = jax.grad(micro_loss, has_aux=True)

    def add_micro(total: tuple, inputs: tuple[Batch, Array]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, gradient(state.adapter, *inputs)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if is_split:
        shapes = jax.eval_shape(gradient, state.adapter, first, jnp.int32(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add_micro, zeros, (batch, jnp.arange(len(batch.tokens))))
    else:
        grads, metrics = gradient(state.adapter, first, jnp.int32(0))

    grads = phases.gradients(grads, state.step)
    updates, moments = optimizer.update(grads, state.moments, state.adapter)
    metrics |= {"grad_norm": optax.tree.norm(grads), "tokens": tokens}
    adapter = optax.apply_updates(state.adapter, phases.updates(updates, state.step))
    state = TrainState(step=state.step + 1, adapter=adapter, moments=moments, key=key)
    return layout.state(state), layout.whole(metrics)
