"""Replicas: S trainings that differ in seed or learning rate, one `train_step` for all of them on one device.

    state_s, metrics_s ← train_step(state_s, backbone, batch_s),    s = 1 … S, by jax.vmap

Every leaf of the states and of the batches is stacked, [S, …]; the backbone is shared. A replica ends as it would alone, up
to rounding, and one that diverges does not disturb the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from adafuse_jax.data.batches import Batch
from adafuse_jax.models.attention import Visibility, attention
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import ONE_PHASE, TrainState, forward, train_step


def with_rate(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with its updates times a rate that stands in its state, so that it is data and not part of the program."""

    def init(params: Any) -> tuple[Any, Array]:
        return optimizer.init(params), jnp.float32(1)

    def update(gradients: Any, state: tuple[Any, Array], params: Any = None) -> tuple[Any, tuple[Any, Array]]:
        updates, inner = optimizer.update(gradients, state[0], params)
        return jax.tree.map(lambda update: state[1] * update, updates), (inner, state[1])

    return optax.GradientTransformation(init, update)


def initial_replicas(
    initial: Callable[[Key[Array, ""]], TrainState], seeds: Sequence[int] | Array, rates: Sequence[float] | Array
) -> TrainState:
    """States `initial(key)` of S seeds, stacked; `initial` uses an optimizer of `with_rate`, and replica s has rate s."""

    def one(seed: Array, rate: Array) -> TrainState:
        state = initial(jax.random.key(seed))
        return TrainState(step=state.step, adapter=state.adapter, moments=(state.moments[0], rate), key=state.key)

    return jax.vmap(one)(jnp.asarray(seeds), jnp.asarray(rates, jnp.float32))


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches of S replicas as one, of [S, A, B, T] arrays."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def replica_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visibility: Visibility,
    window: int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`attention` under `jax.vmap`: the mapped axis becomes rows of one larger batch.

    cuDNN's own batching rule takes no mask that the heads share. The backward pass computes the forward one again.
    """
    rows, ids = q.shape[:2], visibility.segment_ids
    form = _Form(window, scale, softcap, visibility.max_segments, visibility.is_sequence, ids is not None)
    index = jnp.broadcast_to(visibility.query_index, rows)
    return _attention(q, k, v, index, jnp.zeros(rows, jnp.int32) if ids is None else ids, form)


replica_forward = partial(forward, attention=replica_attention)
"""`forward` of `train_step` that can be mapped over replicas on every device."""


@partial(jax.jit, static_argnames=("optimizer", "remat", "unroll", "max_segments", "forward"), donate_argnames="states")
def replicas_step(
    states: TrainState,
    model: Backbone,
    batches: Batch,
    *,
    optimizer: optax.GradientTransformation,
    phases: Phases = ONE_PHASE,
    forward: Callable[..., Any] = replica_forward,
    **options: Any,
) -> tuple[TrainState, dict[str, Array]]:
    """`train_step` of every replica on its own batch; metrics are stacked, too. `remat`, `unroll` and `max_segments` are
    those of `train_step`. A `forward` of one's own must run the backbone with `replica_attention`."""
    step = partial(train_step, optimizer=optimizer, phases=phases, forward=forward, **options)
    return jax.vmap(step, in_axes=(0, None, 0))(states, model, batches)


def _over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays [B, …]; under vmap the mapped axis S is folded into B."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        every = [x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(arrays, batched, strict=True)]
        out = mapped(*(x.reshape(-1, *x.shape[2:]) for x in every))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


@dataclass(frozen=True, slots=True)
class _Form:
    """Everything about a `Visibility` that is no array, and the window, scale and soft cap of `attention`."""

    window: int | None
    scale: float | None
    softcap: float | None
    max_segments: int | None
    is_sequence: bool
    has_segments: bool


def _rows_attention(q: Array, k: Array, v: Array, index: Array, ids: Array, form: _Form) -> Array:
    visibility = Visibility(
        index, jnp.arange(k.shape[1]), ids if form.has_segments else None, form.max_segments, form.is_sequence
    )
    return attention(q, k, v, visibility, form.window, scale=form.scale, softcap=form.softcap)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: Array, k: Array, v: Array, index: Array, ids: Array, form: _Form) -> Array:
    return _over_rows(partial(_rows_attention, form=form))(q, k, v, index, ids)


def _attention_forward(
    q: Array, k: Array, v: Array, index: Array, ids: Array, form: _Form
) -> tuple[Array, tuple[Array, ...]]:
    return _attention(q, k, v, index, ids, form), (q, k, v, index, ids)


def _attention_backward(form: _Form, saved: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    def pull(q: Array, k: Array, v: Array, index: Array, ids: Array, gradient: Array) -> tuple[Array, ...]:
        attend = partial(_rows_attention, index=index, ids=ids, form=form)
        return jax.vjp(attend, q, k, v)[1](gradient)

    return (*_over_rows(pull)(*saved, gradient), None, None)


_attention.defvjp(_attention_forward, _attention_backward)
