"""One decoding step of a whole Llama-family decoder with pre-gated LoRA experts, as one kernel launch.

    h = norm(x);   x ← x + m · o(attention(q h, k h, v h))
    h = norm(x);   x ← x + m · down(act(gate h) · up h)        in every layer;   logits = head norm(x)

with every adapted linear f(h) = W h + Σ_u g_u s B[e_u] (A[e_u] h): the experts e and gates g of a row are the same in all
layers and known before the launch (arXiv 2603.11873, Eq. 2), so their factors are read along with the weights. Some
families have norms of what a block adds, x + m · norm(o(…)). W may be codes and scales, which the kernel dequantises.

It runs on Hopper (Mosaic GPU). Elsewhere, and for shapes that `unsupported_reason` names, decode with the model's own
modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.megakernel.activations import ACTIVATIONS
from pallas_kernels.megakernel.mixture import Mixture, used_first
from pallas_kernels.megakernel.plan import Plan, Profile, make_plan, no_smem_reason
from pallas_kernels.megakernel.sizes import (
    SMEM_BYTES,
    TILE_K,
    TILE_M,
    WGMMA_M,
    chunk_k_tiles,
    max_in_dim,
    min_stages,
    to_k_tiles,
)
from pallas_kernels.quantised import QuantLayout

MAX_BATCH = 32
HEAD_DIMS = TILE_K, 2 * TILE_K, 4 * TILE_K
NORM_PLACEMENTS = "pre", "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the decoder, of one device's shard where several share it, and its equations, as in `ModelConfig`."""

    num_layers: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    norm_placement: str = "pre"
    activation: str = "silu"
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    attention_softcap: float | None = None

    @property
    def has_output_norms(self) -> bool:
        """True if what attention and FFN add has norms of its own."""
        return self.norm_placement == "both"

    @property
    def head_rows(self) -> int:
        """Rows of the head, padded to a multiple of `WGMMA_M`."""
        return -(-self.vocab_size // WGMMA_M) * WGMMA_M

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linears of a layer and of the head."""
        q, kv, d, f = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.embed_dim, self.hidden_dim
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        return attention | {
            "gate_proj": (f, d),
            "up_proj": (f, d),
            "down_proj": (d, f),
            "lm_head": (self.head_rows, d),
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights of the decoder, stacked over layers: `linears` W [L, out, in] by name and `lm_head` [V, D], padded to
    `Shape.head_rows`; `biases` [L, out] of those linears that have one; `norms` [2L + 1, D], of attention and FFN in turn
    and the last one; `output_norms` [2L, D] of what they add, or None; `q_norm`, `k_norm` [L, H] or None. Norms are the
    factor of x / rms(x), in fp32 if it is 1 + w. `windows` [L], positions that a query sees; `ropes` [L], the table of cos
    and sin, None if there is but one.

    With a `layout`, the seven linears are quantised: `linears` has their codes [L, out, bytes], `scales` their scales
    [L, groups, out], which is the other way round than in a `QuantArray`."""

    linears: dict[str, Array]
    biases: dict[str, Array]
    norms: Float[Array, "2L+1 D"]
    q_norm: Float[Array, "L H"] | None
    k_norm: Float[Array, "L H"] | None
    windows: Int[Array, " L"]
    output_norms: Float[Array, "2L D"] | None = None
    ropes: Int[Array, " L"] | None = None
    scales: dict[str, Float[Array, "L groups out"]] = field(default_factory=dict)
    layout: QuantLayout | None = field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A [L, E, R, in] and B [L, E, out, R] by the name of the linear, R a multiple of 64, and the experts that the rows
    use; an expert that no row uses is not read."""

    a: dict[str, Array]
    b: dict[str, Array]
    mixture: Mixture


def unsupported_reason(
    shape: Shape,
    dtype: Any,
    batch: int,
    targets: tuple[str, ...] = (),
    *,
    rank: int = TILE_K,
    max_experts_used: int = 1,
    num_ctas: int = 132,
    layout: QuantLayout | None = None,
) -> str | None:
    """The reason why the megakernel cannot run this, whatever the device; or None. `dtype`: of what is not codes.
    `max_experts_used`: experts that the rows use together, at most. `layout`: of the linears' codes, if they are
    quantised."""
    if jnp.dtype(dtype) != jnp.bfloat16:  # float16 may overflow before a norm
        return f"the weights are {jnp.dtype(dtype)}, and it takes bfloat16"
    if shape.head_dim not in HEAD_DIMS:
        return f"heads have {shape.head_dim} dimensions, and it takes 64, 128 and 256"
    if shape.norm_placement not in NORM_PLACEMENTS:
        return f"the model has norm_placement {shape.norm_placement!r}, which it does not take"
    if shape.activation not in ACTIVATIONS:
        return f"the model has activation {shape.activation!r}, which it does not take"
    if batch > MAX_BATCH:
        return f"{batch} rows are decoded together, and it takes {MAX_BATCH} at most"
    for name, (out, into) in shape.linears().items():
        if out % WGMMA_M or into % TILE_K:
            return f"{name} is [{out}, {into}], and it takes multiples of 64"
        of_linear = None if name == "lm_head" else layout
        if of_linear is not None and of_linear.group_size not in (None, TILE_K, 2 * TILE_K):
            return f"the weights are {of_linear.name}, and it takes groups of 64 and 128"
        if into % (TILE_K * chunk_k_tiles(of_linear)):
            return f"{name} has {into} inputs, and of quantised weights it takes multiples of 128"
        if into > (widest := max_in_dim(batch, layout=of_linear)):
            return f"{name} has {into} inputs, and with {batch} rows it takes {widest} at most"
    if targets and rank % TILE_K:
        return f"experts have rank {rank}, and it takes multiples of {TILE_K}"
    plan = make_plan(
        shape.linears(), targets, batch=batch, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        cache_slots=TILE_M, max_experts_used=max_experts_used, rank=rank, num_ctas=num_ctas, layout=layout,
    )  # fmt: skip
    if plan.stages < min_stages(shape.head_dim):
        if targets:
            bare = unsupported_reason(shape, dtype, batch, num_ctas=num_ctas, layout=layout)
            return bare or no_smem_reason(max_experts_used, rank, batch)
        needed = f"heads of {shape.head_dim} dimensions need {min_stages(shape.head_dim)}"
        return f"inputs of {batch} rows leave room for {plan.stages} chunks of weights, and {needed}"
    return None


def plan_for(
    shape: Shape,
    experts: Experts | None,
    batch: int,
    cache_slots: int,
    num_ctas: int,
    smem_bytes: int = SMEM_BYTES,
    layout: QuantLayout | None = None,
) -> Plan:
    targets = () if experts is None else tuple(experts.a)
    return make_plan(
        shape.linears(), targets, batch=batch, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        cache_slots=cache_slots, max_experts_used=1 if experts is None else len(experts.mixture.experts),
        rank=TILE_K if experts is None else next(iter(experts.a.values())).shape[2], num_ctas=num_ctas,
        smem_bytes=smem_bytes, layout=layout,
    )  # fmt: skip


def decode_token(
    shape: Shape,
    weights: Weights,
    experts: Experts | None,
    x: Float[Array, "B D"],
    cache_k: Float[Array, "L B S K H"],
    cache_v: Float[Array, "L B S K H"],
    positions: Int[Array, " B"],
    cos: Float[Array, "*ropes B H/2"],
    sin: Float[Array, "*ropes B H/2"],
    *,
    axis: str | None = None,
    interpret: Any = False,
    num_ctas: int | None = None,
    one_launch: bool = True,
    profile: Profile | None = None,
) -> tuple[Float[Array, "B V"], Float[Array, "L B K H"], Float[Array, "L B K H"]]:
    """Logits (fp32), and the keys and values of the token, which the caller writes into the cache.

    Several devices run the step together in a `jax.shard_map` over `axis`. The axes of query and key-value heads,
    hidden units and the head's vocabulary are sharded, and `shape` has their sizes on one device; arrays without such an
    axis are replicated, as are x, the experts' ids and gates, and the logits.

    Args:
      x: embeddings of the tokens.
      cache_k, cache_v: keys and values of positions 0 … positions[b] − 1; S is a multiple of 128. There may be more rows
        than tokens: those behind them are not read.
      positions: of the tokens; a row whose position is S or more reads the whole cache.
      cos, sin: of the positions' angles, fp32; with `weights.ropes` several tables of them.
      axis: of a mesh that has no other; its devices belong to one process and reach each other's memory.
      num_ctas: default, one on each multiprocessor; `interpret` on the CPU; without `one_launch` a launch per phase.
      profile: write a timeline of the launch.

    Raises:
      ValueError: what `unsupported_reason` names.
    """
    from pallas_kernels.megakernel.kernel_sm90 import run_megakernel

    batch, slots = len(x), cache_k.shape[2]
    ctas = num_ctas or jax.devices()[0].core_count
    used: dict[str, Any] = {}
    if experts is not None:
        rank = next(iter(experts.a.values())).shape[2]
        used = {"targets": tuple(experts.a), "rank": rank, "max_experts_used": len(experts.mixture.experts)}
    reason = unsupported_reason(shape, x.dtype, batch, **used, num_ctas=ctas, layout=weights.layout)
    if reason is None and interpret is False and not one_launch:
        reason = "compiled, all phases are one launch"
    if reason is None and interpret is not False and one_launch and ctas > 1:
        reason = "interpreted, several CTAs need a launch for each phase"
    if reason is None and interpret is not False and axis is not None:
        reason = "interpreted, devices do not reach each other's memory"
    if reason is not None:
        raise ValueError(f"decode_token cannot run: {reason}")
    smem_bytes = SMEM_BYTES - (profile.smem_bytes if profile else 0)
    plan = plan_for(shape, experts, batch, slots, ctas, smem_bytes, weights.layout)
    rows = ((0, plan.padded_batch - batch), (0, 0))
    x = jnp.pad(x, rows)

    def to_two(x: Array) -> Array:
        """Concatenate an array of a head of TILE_K dimensions with itself; return one of more as it is."""
        return x if x.shape[-1] > TILE_K else jnp.concatenate([x, x], axis=-1)

    def to_heads(first_half: Array, second_half: Array) -> Array:
        """[ropes · N, H] of [*ropes, B, H/2]: the rows of one table after those of the other."""
        x = jnp.concatenate([first_half, second_half], axis=-1)
        return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + rows).reshape(-1, shape.head_dim)

    # The kernel adds up the squares of each 64 dimensions; here those of a whole row are the first of these sums.
    row_sums = jnp.square(x.astype(jnp.float32)).sum(axis=1)
    square_sums = (-(-shape.embed_dim // WGMMA_M**2) * WGMMA_M, plan.padded_batch)
    inputs: dict[str, Any] = {
        "x": to_k_tiles(x), "x_weighted": to_k_tiles((x * weights.norms[0]).astype(x.dtype)),
        "square_sums": jnp.zeros(square_sums, jnp.float32).at[0].set(row_sums),
        "positions": jnp.minimum(positions, slots).astype(jnp.int32), "windows": weights.windows,
        "cos": to_heads(cos, cos), "sin": to_heads(-sin, sin), "norms": weights.norms,
        "cache_k": cache_k, "cache_v": cache_v, "weights": weights.linears, "biases": weights.biases,
        "scales": weights.scales,
    }  # fmt: skip
    if weights.q_norm is not None and weights.k_norm is not None:
        inputs |= {"q_norm": to_two(weights.q_norm), "k_norm": to_two(weights.k_norm)}
    optional = {"output_norms": weights.output_norms, "ropes": weights.ropes}
    inputs |= {name: array for name, array in optional.items() if array is not None}
    if experts is not None:
        mixture, num_used = used_first(experts.mixture)
        gates = jnp.pad(mixture.gates, ((0, 0), (0, plan.padded_batch - batch)))
        inputs |= {"experts": mixture.experts, "num_used": num_used, "gates": gates}
        inputs |= {"a": experts.a, "b": experts.b}
    logits, k_new, v_new = run_megakernel(
        inputs, plan, shape, axis=axis, interpret=interpret, one_launch=one_launch, profile=profile
    )
    of_devices = logits.reshape(-1, shape.head_rows, plan.padded_batch)[:, : shape.vocab_size]
    return of_devices.reshape(-1, plan.padded_batch)[:, :batch].T, k_new[:, :batch], v_new[:, :batch]
