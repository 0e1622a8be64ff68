"""Losses of the targets of packed questions, under every replica."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.replicas import replica_forward
from studies.questions import Packed
from studies.training import Texts


@partial(jax.jit, static_argnames="forward")
def target_losses(
    model: Backbone,
    trained: Any,
    texts: Texts,
    place: Int[Array, "B K"],
    wanted: Int[Array, "B K"],
    *,
    forward: Callable[..., Any] = replica_forward,
) -> tuple[Float[Array, "S B K"], Bool[Array, "S B K"]]:
    """(−log p of `wanted` after the tokens at `place` in nats, whether it is the likeliest token) under every replica; no
    other logits are made. `trained` None is the bare backbone, S = 1."""

    def one(trained: Any) -> tuple[Array, Array]:
        backbone, out = forward(trained, model, texts)
        logits = backbone.logits(jnp.take_along_axis(out.hidden, place[..., None], axis=1))  # [B, K, V]
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == wanted

    if trained is None:
        return jax.tree.map(lambda x: x[None], one(None))
    return jax.vmap(one)(trained)


def score(
    model: Backbone,
    trained: Any,
    packed: Packed,
    *,
    batch_size: int,
    task: int | None = None,
    losses_of: Callable[..., tuple[Array, Array]] = target_losses,
) -> tuple[Float[np.ndarray, "S N K"], Bool[np.ndarray, "S N K"]]:
    """`target_losses` of all rows; `losses_of` may be compiled for `batch_size` rows. `task`: the set that they are of."""
    parts, of_prompts = [], packed.prompts
    for at in range(0, len(packed.tokens), batch_size):
        tokens, positions, segment_ids, place, wanted, prompts = (
            np.pad(array[at : at + batch_size], ((0, max(0, at + batch_size - len(array))), (0, 0)))
            for array in (packed.tokens, packed.positions, packed.segment_ids, packed.place, packed.wanted, of_prompts)
        )
        of_task = {} if task is None else {"tasks": np.full_like(tokens, task), "prompts": prompts}
        texts = Texts(tokens=tokens, positions=positions, segment_ids=segment_ids, **of_task)
        parts.append(losses_of(model, trained, texts, place, wanted))
    losses, hits = (np.concatenate(arrays, axis=1) for arrays in zip(*jax.device_get(parts), strict=True))
    return losses[:, : len(packed.tokens)], hits[:, : len(packed.tokens)]


def compiled_losses(
    model: Backbone, trained: Any, *, rows: int, length: int, targets: int, has_tasks: bool, forward: Callable[..., Any]
) -> Callable[..., tuple[Array, Array]]:
    """`target_losses` compiled for `rows` rows of `length` tokens with K = `targets`."""
    row, target = (jax.ShapeDtypeStruct((rows, width), jnp.int32) for width in (length, targets))
    of_task: dict[str, Any] = {"tasks": row, "prompts": jax.ShapeDtypeStruct((rows, length), bool)} if has_tasks else {}
    texts: Any = Texts(tokens=row, positions=row, segment_ids=row, **of_task)  # type: ignore[arg-type]
    return target_losses.lower(model, trained, texts, target, target, forward=forward).compile()
