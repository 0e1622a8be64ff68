"""One layer with all seven linears adapted, by rank and length: the bare layer, and what each kind of mixture adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter
from adafuse_jax.models.kv_cache import KVCache
from benchmarks.common.jobs import Report
from benchmarks.common.records import first_line
from benchmarks.common.timing import time_calls
from benchmarks.decode.costs import SIZES
from benchmarks.decode.models import adapter_config, model_config, random_adapter, random_backbone

CONTEXT = 512
"""Cache slots of a decode step."""
REPEATS = 5


def layer_call(model: Backbone, adapter: Adapter | None, length: int) -> tuple[Callable[[Any], Any], Any]:
    """(call, state): run tokens [1, length] through the layers, the next ones depending on what came out."""
    slots = CONTEXT if length == 1 else length
    leaves, tree = jax.tree.flatten((model, adapter))

    @partial(jax.jit, donate_argnums=1)
    def run(leaves: list[Array], state: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        model, adapter = jax.tree.unflatten(tree, leaves)
        tokens, cache = state
        positions = slots - length + jnp.arange(length)[None]
        out = model.run(tokens, adapter=adapter, positions=positions, cache=cache, unroll=True)
        tokens = jnp.where(jnp.isfinite(out.hidden[..., 0]), tokens + 1, 0) % model.config.vocab_size
        return tokens, out.cache

    state = jnp.arange(length)[None] % model.config.vocab_size, KVCache.empty(model.config, 1, slots, model.dtype)
    return partial(run, leaves), state


def layer_points(ranks: Sequence[int], lengths: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """(rank, length): every rank at the first and the middle length, every length at the rank of the rows."""
    swept = [(r, t) for t in (lengths[0], lengths[len(lengths) // 2]) for r in ranks]
    return swept + [(rank, t) for t in lengths if (rank, t) not in swept]


def measure_layer(job: dict[str, Any], report: Report) -> None:
    """ms of one layer with all seven linears adapted: the bare layer, and what each kind of mixture adds."""
    shapes, num_layers, lengths = SIZES[job["size"]], job["num_layers"], job["lengths"]
    config = replace(model_config(shapes), num_layers=num_layers, vocab_size=min(shapes.vocab_size, 256))
    model = random_backbone(config)
    found: list[dict[str, Any]] = []

    def per_layer(adapter: Adapter | None, length: int) -> float:
        timing, _ = time_calls(*layer_call(model, adapter, length), seconds=job["seconds"], repeats=REPEATS)
        return timing.ms / num_layers

    bare = {length: per_layer(None, length) for length in lengths}
    print("  bare layer: " + ", ".join(f"T={t} {ms:.4f} ms" for t, ms in bare.items()), flush=True)
    for rank, length in layer_points(job["ranks"], lengths, shapes.rank):
        row: dict[str, Any] = {"rank": rank, "length": length, "backbone_ms": bare[length]}
        for name, method in (("adafuse", "adafuse"), ("layerwise", "moral")):
            try:
                adapter = random_adapter(adapter_config(shapes, "all7", rank, method), config)
                row[f"{name}_ms"] = per_layer(adapter, length) - bare[length]
            except Exception as error:
                row[f"{name}_error"] = first_line(error)
        found.append(row)
        parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  layer: " + ", ".join(parts), flush=True)
        report({"breakdown": found})
