"""Expert use by set: the share of a set's assignments that each expert gets, of arms with one router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.router import expert_load
from adafuse_jax.models.decoder import Backbone
from studies.accuracy import pregated
from studies.accuracy.tasks import SETS
from studies.questions import Packed
from studies.training import Texts

Use = dict[str, list[float]]
"""Set → share of each expert."""


@jax.jit
def shares(model: Backbone, trained: Any, texts: Texts) -> Float[Array, "S E"]:
    """Shares of the experts in the real tokens of some rows."""

    def one(trained: Any) -> Array:
        _, out = pregated.forward(trained, model, texts)
        return expert_load(out.routing, jnp.asarray(texts.segment_ids) > 0)[0]

    return jax.vmap(one)(trained)


def compiled(
    model: Backbone, trained: Any, *, rows: int, length: int
) -> Callable[[Backbone, Any, Mapping[str, Packed]], list[Use] | None]:
    """Function from (model, adapters, questions by set) to the use by every replica in the first `rows` rows of each set;
    it returns None for an arm without one router."""
    if not isinstance(trained, AdaFuse):
        return lambda *_: None
    row, mask = (jax.ShapeDtypeStruct((rows, length), kind) for kind in (jnp.int32, bool))
    shapes: Any = Texts(tokens=row, positions=row, segment_ids=row, tasks=row, prompts=mask)  # type: ignore[arg-type]
    program = shares.lower(model, trained, shapes).compile()

    def use(model: Backbone, trained: Any, scored: Mapping[str, Packed]) -> list[Use]:
        found = {}
        for name, packed in scored.items():
            tokens, positions, segment_ids, prompts = (
                np.pad(array[:rows], ((0, max(0, rows - len(array))), (0, 0)))
                for array in (packed.tokens, packed.positions, packed.segment_ids, packed.prompts)
            )
            tasks = np.full_like(tokens, SETS.index(name))
            texts = Texts(tokens=tokens, positions=positions, segment_ids=segment_ids, tasks=tasks, prompts=prompts)
            found[name] = np.round(np.asarray(program(model, trained, texts), np.float64), 4).tolist()
        replicas = len(next(iter(found.values())))
        return [{name: values[replica] for name, values in found.items()} for replica in range(replicas)]

    return use
