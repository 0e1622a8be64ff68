"""Rotary position embedding in all its kinds, as transformers computes them.

    (x_i, x_j) ← a · (x_i cos pω_i − x_j sin pω_i, x_j cos pω_i + x_i sin pω_i)        at position p, with ω_i = θ^(−2i/R)

over the first R = H · partial_rotary_factor dimensions of a head, in pairs j = i + R/2, or (2i, 2i+1) if `interleaved`; the
others stay as they are. a is `attention_factor`. How a kind changes ω:

    linear     ω / factor
    llama3     ω / factor for long wavelengths, ω for short ones, blended between
    yarn       ω / factor for pairs that turn less than `beta_slow` times in the original length, ω above `beta_fast`
    dynamic    θ · (factor · n / original − factor + 1)^(R/(R−2)) in place of θ, for sequences of n > original tokens
    longrope   ω / long_factor in sequences longer than the original length, else ω / short_factor

The last two depend on n, the length of the sequence at the time that the token is read, as transformers has it: of a prompt
its own length, of a token decoded after it position + 1. Keys stay in the cache as they were rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adafuse_jax.models.config import ModelConfig, RopeConfig

TABLE_FIELDS = tuple(
    f"rope.{field.name}"
    for field in fields(RopeConfig)
    if field.name not in ("partial_rotary_factor", "interleaved", "query_scaling_beta")
)
"""Fields of `ModelConfig` that reach a kernel through cos and sin, [B, H/2], of the pairs (x_i, x_{i+H/2})."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of heads at some positions, fp32. `cos` and `sin` have the attention factor in them; `query_scale` is a
    factor of queries alone, None for 1."""

    cos: Float[Array, "B T 1 R/2"]
    sin: Float[Array, "B T 1 R/2"]
    query_scale: Float[Array, "B T 1 1"] | None = None
    interleaved: bool = field(default=False, metadata={"static": True})

    def of_keys(self, k: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
        return self._rotated(k, None)

    def of_queries(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        return self._rotated(q, self.query_scale)

    def _rotated(self, x: Array, scale: Array | None) -> Array:
        size = 2 * self.cos.shape[-1]
        x32 = x.astype(jnp.float32)
        pairs, rest = x32[..., :size], x32[..., size:]
        if self.interleaved:
            first, second = pairs[..., 0::2], pairs[..., 1::2]
        else:
            first, second = jnp.split(pairs, 2, axis=-1)
        first, second = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        if self.interleaved:
            rotated = [jnp.stack([first, second], axis=-1).reshape(pairs.shape)]
        else:
            rotated = [first, second]
        if rest.shape[-1]:
            rotated.append(rest)
        out = jnp.concatenate(rotated, axis=-1)
        return (out if scale is None else out * scale).astype(x.dtype)


def rotation(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "#B T"],
    lengths: Int[Array, "#B #T"] | None = None,
) -> Rotation:
    """The rotation at `positions`. `lengths`: tokens of each token's sequence, which only kinds that depend on them read;
    default: position + 1, as of tokens decoded one after the other."""
    if not rope.depends_on_length:
        frequency = rope_frequencies(rope, head_dim)
    else:
        lengths = positions + 1 if lengths is None else lengths
        frequency = rope_frequencies(rope, head_dim, lengths[..., None, None])
    angles = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = (
        f(angles) if rope.attention_factor == 1 else f(angles) * rope.attention_factor for f in (jnp.cos, jnp.sin)
    )
    scale = None
    if rope.query_scaling_beta:
        spans = jnp.floor(positions[..., None, None].astype(jnp.float32) / rope.original_max_position_embeddings)
        scale = 1 + rope.query_scaling_beta * jnp.log1p(spans)
    return Rotation(cos, sin, scale, rope.interleaved)


def layer_rotations(
    config: ModelConfig, positions: Int[Array, "#B T"], lengths: Int[Array, "#B #T"] | None = None
) -> Callable[[int | Array], Rotation]:
    """The rotation of each layer, by its index; layers without rotary embedding turn by 0."""
    distinct, at = layer_ropes(config)
    usual = rotation(config.rope, config.head_dim, positions, lengths)
    still = replace(usual, cos=jnp.ones_like(usual.cos), sin=jnp.zeros_like(usual.sin))
    found = [
        usual if rope == config.rope else still if rope is None else rotation(rope, config.head_dim, positions, lengths)
        for rope in distinct
    ]
    if len(found) == 1:
        return lambda layer: found[0]
    stacked = jax.tree.map(lambda *tables: jnp.stack(jnp.broadcast_arrays(*tables)), *found)

    def of_layer(layer: int | Array) -> Rotation:
        if isinstance(layer, int):
            return found[at[layer]]
        return jax.tree.map(lambda tables: tables[jnp.array(at)[layer]], stacked)

    return of_layer


def layer_ropes(config: ModelConfig) -> tuple[list[RopeConfig | None], list[int]]:
    """The different rotary embeddings of the layers, and the index of each layer's."""
    of_layers = [config.rope_of(layer) for layer in range(config.num_layers)]
    ropes = list(dict.fromkeys(of_layers))
    return ropes, [ropes.index(rope) for rope in of_layers]


def rope_tables(config: ModelConfig, positions: Int[Array, " B"]) -> tuple[Array, Array]:
    """cos and sin as kernels read them, [B, R/2], or of several rotary embeddings [ropes, B, R/2]."""
    ropes, at = layer_ropes(config)
    rotation_of = layer_rotations(config, positions[:, None])
    rotations = [rotation_of(at.index(rope)) for rope in range(len(ropes))]
    cos, sin = [r.cos[:, 0, 0] for r in rotations], [r.sin[:, 0, 0] for r in rotations]
    return (cos[0], sin[0]) if len(ropes) == 1 else (jnp.stack(cos), jnp.stack(sin))


def rope_frequencies(
    rope: RopeConfig, head_dim: int, lengths: Int[Array, "*length 1"] | None = None
) -> Float[Array, "*length R/2"]:
    """Angular frequency ω of each rotated pair, in radians per position, in sequences of `lengths` tokens for the kinds that
    depend on it."""
    dim = rope.rotary_dim(head_dim)
    exponent = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    # Rounded as PyTorch rounds it: a last bit of ω is 10⁻⁴ radians a thousand positions on.
    frequency = np.float32(1) / np.float32(rope.theta ** np.float64(exponent))
    original = rope.original_max_position_embeddings
    if rope.kind == "linear":
        return jnp.asarray(frequency / rope.factor)
    if rope.kind == "llama3":
        turns = original * frequency / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return jnp.asarray(frequency * (keep + (1 - keep) / rope.factor))
    if rope.kind == "yarn":
        keep = np.float32(1 - _yarn_ramp(rope, dim))
        return jnp.asarray(frequency / rope.factor * (1 - keep) + frequency * keep)
    if rope.kind == "dynamic":
        assert lengths is not None
        ratio = jnp.maximum(lengths, original).astype(jnp.float32) / original
        theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (dim / (dim - 2))
        return theta**-exponent
    if rope.kind == "longrope":
        assert lengths is not None
        long, short = (jnp.array(factors, jnp.float32) for factors in (rope.long_factor, rope.short_factor))
        return frequency / jnp.where(lengths > original, long, short)
    return jnp.asarray(frequency)


def _yarn_ramp(rope: RopeConfig, dim: int) -> np.ndarray:
    """Share of ω / factor in each pair's frequency, [R/2]: 0 up to the pair that turns `beta_fast` times in the original
    length, 1 from the one that turns `beta_slow` times."""

    def pair_of(turns: float) -> float:
        return (
            dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


def sequence_lengths(
    positions: Int[Array, "#B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Int[Array, "#B #T"]:
    """Tokens of the sequence that each token is in: its row, or its run of equal `segment_ids`."""
    if segment_ids is None:
        return positions.max(axis=1, keepdims=True) + 1
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    run = jnp.cumsum(begins, axis=1)  # [B, T]

    def of_row(positions: Array, run: Array) -> Array:
        return jax.ops.segment_max(positions, run, num_segments=len(run))[run] + 1

    return jax.vmap(of_row)(jnp.broadcast_to(positions, run.shape), run)
