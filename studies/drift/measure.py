"""Weight error and KL of *switch*, *golden* and *unmerged* (the package's docstring defines both)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from adafuse_jax import AdaFuse, Backbone
from adafuse_jax.adapters.adafuse import AdaFuseLayer
from adafuse_jax.checkpoints.adapter_directory import load_adapter
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.merged import Merged, adapted_weights, factors, unmerge, with_weights
from adafuse_jax.inference.sampling import Sampling, sample
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.hooks import Routing
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.layers import Linear
from benchmarks.common.timing import Stopwatch, wait
from pallas_kernels.sgmm import choose_implementation, golden_terms, sgmm, switch_terms
from pallas_kernels.sgmm.reference import merge_layer


class EachTokenMerged:
    """An `Adapter` for whole texts that runs every token with weights of its own, W + Δ(g) rounded to W's type."""

    def __init__(self, adapter: AdaFuse):
        self.adapter, self.experts = adapter, adapter.experts

    def initial_routing(self, batch: int, length: int) -> Routing:
        return self.adapter.initial_routing(batch, length)

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: Routing, key: Key[Array, ""] | None
    ) -> EachTokenMergedLayer:
        return EachTokenMergedLayer(self.adapter, experts, layer, routing, key)


class EachTokenMergedLayer(AdaFuseLayer):
    def __call__(self, name: str, linear: Linear, x: Array) -> Array:
        if name not in self.experts:
            return linear(x)
        if name == self.adapter.first_target:
            self._route(x)
        ab, scale = self.experts[name], self.adapter.config.scale

        def one(token: tuple[Array, Array, Array]) -> Array:
            x, experts, gates = token
            return linear(x, merge_layer(linear.weight[...], ab.A[...], ab.B[...], golden_terms(experts, gates, scale)))

        tokens = jax.tree.map(lambda v: v[0], (x, self.routing.experts, self.routing.gates))
        return jax.lax.map(one, tokens, batch_size=16)[None]


@partial(jax.jit, static_argnames=("rows", "length"))
def sample_tokens(model: Backbone, adapter: AdaFuse, first: int, rows: int, length: int) -> Int[Array, "rows length"]:
    """Tokens that the adapted model samples after the token `first`."""

    def step(carry: tuple[Array, KVCache, Array], position: Array) -> tuple[tuple[Array, KVCache, Array], Array]:
        tokens, cache, key = carry
        out = model(tokens[:, None], adapter=adapter, positions=jnp.full((rows, 1), position), cache=cache)
        assert out.logits is not None
        assert out.cache is not None
        key, draw = jax.random.split(key)
        return (
            sample(out.logits[:, 0], Sampling.of(temperature=1.0), jax.random.split(draw, rows), None),
            out.cache,
            key,
        ), tokens

    cache = KVCache.empty(model.config, rows, length, model.dtype)
    carry = jnp.full(rows, first, jnp.int32), cache, jax.random.key(0)
    return jax.lax.scan(step, carry, jnp.arange(length))[1].T


def text_tokens(text: Path, tokenizer: Any, rows: int, length: int) -> Int[np.ndarray, "rows length"]:
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < 2 * length:
        raise UserError(f"--text {text}: has {len(ids)} tokens; give one of at least {2 * length}")
    held_out, stream = ids[:length], ids[length:]
    return np.array([*held_out, *np.resize(stream, (rows - 1) * length)], np.int32).reshape(rows, length)


@jax.jit
def gates_of(
    model: Backbone, adapter: AdaFuse, tokens: Int[Array, "rows length"]
) -> tuple[Int[Array, "S k"], Float[Array, "S k"]]:
    """Experts and gates of every token."""
    routing = jax.lax.map(lambda row: model.run(row[None], adapter=adapter).routing, tokens, batch_size=8)
    return tuple(x.reshape(-1, x.shape[-1]) for x in (routing.experts, routing.gates))


@partial(jax.jit, donate_argnames="merged")
def switch(
    adapter: AdaFuse, merged: Merged, experts: Int[Array, "S k"], gates: Float[Array, "S k"], start: Array, stop: Array
) -> Merged:
    """The steps of tokens [start, stop), each as `Merging` does it."""

    def step(t: Array, merged: Merged) -> Merged:
        terms = switch_terms((merged.experts, merged.gates), (experts[t], gates[t]), adapter.config.scale)
        weights = sgmm(merged.weights, *factors(adapter), terms)
        return replace(merged, weights=weights, experts=experts[t], gates=gates[t])

    return jax.lax.fori_loop(start, stop, step, merged)


@jax.jit
def golden(pristine: dict[str, Array], adapter: AdaFuse, merged: Merged) -> dict[str, Array]:
    """The weights of `merged`'s gates, from the pristine ones."""
    terms = golden_terms(merged.experts, merged.gates, adapter.config.scale)
    out = jax.tree.map(jnp.zeros_like, pristine)
    return sgmm(out, *factors(adapter), terms, pristine=pristine)


def load_adafuse(directory: str, config: ModelConfig, *, backbone_identity: str, dtype: jnp.dtype) -> AdaFuse:
    """The adapter in `directory`; the other methods have no strategy that drifts."""
    adapter = load_adapter(directory, config, backbone_identity=backbone_identity, dtype=dtype)
    if not isinstance(adapter, AdaFuse):
        raise UserError(f"{directory}: is an adapter of {adapter.config.adapter}; give one of adafuse")
    return adapter


def weight_error(weights: dict[str, Array], pristine: dict[str, Array], adapter: AdaFuse, merged: Merged) -> float:
    """‖W − W_exact‖ / ‖W_exact‖, W_exact for the gates of `merged`."""
    with jax.enable_x64(True):
        a, b = factors(adapter)
        scale = jnp.float64(adapter.config.scale)
        squares = [
            _squares(w, pristine[name], a[name], b[name], merged.experts, merged.gates, scale)
            for name, w in weights.items()
        ]
        difference, norm = np.sum([np.asarray(s) for s in squares], axis=0)
    return float(np.sqrt(difference / norm))


@jax.jit
def _squares(
    w: Array, pristine: Array, a: Array, b: Array, experts: Array, gates: Array, scale: Array
) -> tuple[Array, Array]:
    """‖W − W_exact‖² and ‖W_exact‖² of one linear in all layers."""

    def layer(leaves: tuple[Array, ...]) -> tuple[Array, Array]:
        w, pristine, a, b = (leaf.astype(jnp.float64) for leaf in leaves)
        delta = jnp.einsum("j,jor,jri->oi", scale * gates.astype(jnp.float64), b, a, precision="highest")
        exact = pristine + delta
        return jnp.sum((w - exact) ** 2), jnp.sum(exact**2)

    chosen = a[:, experts], b[:, experts]
    difference, norm = jax.lax.map(layer, (w, pristine, *chosen))
    return difference.sum(), norm.sum()


@jax.jit
def logits_of(model: Backbone, adapter: AdaFuse, tokens: Int[Array, " T"]) -> Float[Array, "T V"]:
    logits = model(tokens[None], adapter=adapter).logits
    assert logits is not None
    return logits[0]


@jax.jit
def merged_logits(model: Backbone, adapter: AdaFuse, tokens: Int[Array, " T"]) -> Float[Array, "T V"]:
    """Logits with every token's experts merged into the model's weights."""
    logits = model(tokens[None], adapter=EachTokenMerged(adapter)).logits
    assert logits is not None
    return logits[0]


def divergence(exact: Float[Array, "T V"], other: Float[Array, "T V"]) -> float:
    """Mean KL(exact ‖ other) in nats."""
    with jax.enable_x64(True):
        p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float64)) for x in (exact, other))
        return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


def measure(
    model: Backbone, adapter: AdaFuse, tokens: Int[Array, "rows length"], decades: Sequence[int]
) -> dict[str, Any]:
    """Weight error and KL of every strategy with weights of the model's type; row 0 of the tokens is held out."""
    held_out, stream = tokens[0], tokens[1:]
    in_fp32 = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), m) for m in (model, adapter))
    exact = logits_of(*in_fp32, held_out)
    pristine = adapted_weights(model, adapter)
    experts, gates = gates_of(model, adapter, stream)
    merged = Merged.nothing("switch", jax.tree.map(jnp.copy, model), adapter)
    implementation = choose_implementation(pristine, factors(adapter)[0])

    done, drifted = 0, []
    for steps in decades:
        watch = Stopwatch()
        merged = wait(switch(adapter, merged, experts, gates, done, steps))
        seconds = watch.seconds
        error = weight_error(merged.weights, pristine, adapter, merged)
        left = unmerge(adapter, jax.tree.map(jnp.copy, merged)).weights
        kl = divergence(exact, merged_logits(with_weights(model, left), adapter, held_out))
        drifted.append({"steps": steps, "weight_error": error, "kl": kl})
        print(f"{model.dtype} switch {steps:6d}: weights {error:.2e}, KL {kl:.2e} ({seconds:.1f} s)", flush=True)
        done = steps
    once = golden(pristine, adapter, merged)
    return {
        "sgmm": implementation,
        "switch": drifted,
        "golden": {
            "weight_error": weight_error(once, pristine, adapter, merged),
            "kl": divergence(exact, merged_logits(model, adapter, held_out)),
        },
        "unmerged": {"weight_error": None, "kl": divergence(exact, logits_of(model, adapter, held_out))},
    }
