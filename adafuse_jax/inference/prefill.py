"""Prefill: prompts in chunks whose lengths come from a few buckets, so that few programs serve all lengths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.prompts import PromptAdapter, all_experts_reason, is_routed_by_token
from adafuse_jax.adapters.stacked import StackedAdapters
from adafuse_jax.inference.backends.base import dispatch_log_level
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import row_keys
from adafuse_jax.models.config import ModelConfig, RopeConfig, unsupported_field
from adafuse_jax.models.decoder import Backbone, normed
from adafuse_jax.models.hooks import Adapter
from pallas_kernels import prefill_attention as attention_kernel
from pallas_kernels.devices import triton_unsupported_reason

log = logging.getLogger(__name__)

CHUNKS = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Prompt tokens per prefill program. Below 64 a program costs what reading the weights does, whatever it holds."""
SCORED_CHUNKS = (64, 256, 1024)
"""Chunks of prompts whose log-probabilities are wanted: few, as each is a program of its own."""
LARGEST_WITHOUT_KERNELS = 1024
"""Prompt tokens per program, at most, where attention has a mask, or scores in memory."""
MAX_TOKENS = 8192
"""Tokens of all rows per program, which bound the memory of activations; as many fill any GPU."""
LARGEST_BESIDE_ROWS = 256
"""Prompt tokens per program, at most, while other rows wait for it with their next token."""
TOKENS_OF_A_PROGRAM = 128
"""Tokens whose products take as long as what each program costs beside its products, about."""
CONSUMED_FIELDS = frozenset({
    "vocab_size", "embed_dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "norm_eps",
    "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "sliding_windows",
    "norm", "norm_placement", "parallel_block", "activation", "local_rope", "nope_layers", "qk_norm_full",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logit_multiplier", "attention_softcap",
    "logit_softcap", *(f"rope.{field.name}" for field in fields(RopeConfig)),
    "model_type", "max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id",
})  # fmt: skip
"""Fields of `ModelConfig` that a prefill by kernels knows; a model with any other is prefilled without them."""


def kernels_unsupported_reason(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None) -> str | None:
    """The reason why prompts are not prefilled by kernels, or None. By kernels means attention without a mask
    (`pallas_kernels.prefill_attention`), and the products of AdaFuse's chosen experts only, where that is faster."""
    if mesh is not None:
        return "they run on one device, and the model is on several"
    device = jax.devices()[0]
    return (
        triton_unsupported_reason(device)
        or unsupported_field(config, CONSUMED_FIELDS)
        or attention_kernel.unsupported_reason(config.head_dim, dtype)
    )


@lru_cache
def prefills_by_kernels(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None) -> bool:
    """True where prompts are prefilled by kernels; logged once for each model."""
    reason = kernels_unsupported_reason(config, dtype, mesh)
    how = "by flash attention over the cache" if reason is None else f"in XLA ops: the kernels cannot, as {reason}"
    log.log(dispatch_log_level(), "prompts are prefilled %s", how)
    return reason is None


def largest_chunk(num_rows: int, *, beside_rows: bool, by_kernels: bool) -> int:
    """Prompt tokens per program, at most, of rows that are prefilled together. `beside_rows`: others run meanwhile."""
    most = CHUNKS[-1] if by_kernels else LARGEST_WITHOUT_KERNELS
    return min(LARGEST_BESIDE_ROWS if beside_rows else most, MAX_TOKENS // num_rows)


def adapter_of_prompts(model: Backbone, adapter: Adapter | None, tokens: Int[Array, "R T"]) -> Adapter | None:
    """The adapter as prompts are read with it by kernels: AdaFuse and a bank are routed before the layers where routers see
    the token alone, and their products are those of the chosen experts where that is faster; logged when the program is
    made."""
    if adapter is None:
        return None
    if not isinstance(adapter, AdaFuse | StackedAdapters):
        reason: str | None = f"{type(adapter).__name__} has products of its own"
    elif isinstance(adapter, StackedAdapters) and len(tokens) > 1:
        reason = f"{len(tokens)} rows may have different adapters"
    else:
        reason = all_experts_reason(adapter, model.config, tokens.size, model.dtype)
    what = "the chosen experts" if reason is None else f"all experts ({reason})"
    log.log(dispatch_log_level(), "%d prompt tokens: products of %s", tokens.size, what)
    if not isinstance(adapter, AdaFuse | StackedAdapters) or not is_routed_by_token(adapter):
        return adapter
    norm = jax.tree.map(lambda leaf: leaf[0], model.layers.input_layernorm)
    x = normed(norm, model.embed(tokens))
    return PromptAdapter.of(adapter, x, model.config, only_chosen=reason is None)


@dataclass(slots=True, kw_only=True)
class Prefill:
    """Rows whose prompts are prefilled together, in chunks of `sizes`, `done` of which are queued.

    `whole`: they are all slots. `logits` [R, V] and `keys` [R] are those of their first tokens.
    """

    rows: list[Row]
    sizes: list[int]
    whole: bool
    logits: Any
    keys: Any
    done: int = 0

    @classmethod
    def of(cls, rows: list[Row], vocab_size: int, *, whole: bool, most: int) -> Prefill:
        """The prefill of `rows` before its first chunk, in chunks of at most `most` tokens."""
        by_seed = [(seed, list(alike)) for seed, alike in groupby(rows, key=lambda row: row.seed)]
        keys = [row_keys(seed, [r.prompt for r in alike], [r.sample for r in alike]) for seed, alike in by_seed]
        longest = max(len(row.prompt) - row.cached for row in rows)
        is_scored = any(row.wanted_prompt_logprobs is not None for row in rows)
        return cls(
            rows=rows,
            sizes=chunk_lengths(longest, most, SCORED_CHUNKS if is_scored else CHUNKS),
            whole=whole,
            logits=jnp.zeros((len(rows), vocab_size), jnp.float32),
            keys=keys[0] if len(keys) == 1 else jnp.concatenate(keys),
        )

    @property
    def slots(self) -> np.ndarray:
        return np.array([row.slot for row in self.rows], np.int32)

    def chunk(self, at: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens [R, size], starts [R], lengths [R]) of the chunk that begins `at` tokens after what the cache has."""
        tokens = np.zeros((len(self.rows), size), np.int32)
        rest = [row.prompt[row.cached + at :][:size] for row in self.rows]
        for line, part in zip(tokens, rest, strict=True):
            line[: len(part)] = part
        starts = np.array([row.cached + at for row in self.rows], np.int32)
        return tokens, starts, np.array([len(part) for part in rest], np.int32)


def chunks_up_to(most: int, chunks: Sequence[int] | None = None) -> list[int]:
    """Chunks of at most `most` tokens among `chunks`, by default `CHUNKS`, or the smallest."""
    chunks = CHUNKS if chunks is None else chunks
    return [c for c in chunks if c <= most] or [chunks[0]]


def chunk_lengths(length: int, most: int | None = None, chunks: Sequence[int] | None = None) -> list[int]:
    """Chunks among `chunks`, of at most `most` tokens if that is given, that hold a prompt: the largest as often as it is
    filled, then those that take the least time for the rest."""
    allowed = chunks_up_to(CHUNKS[-1] if most is None else most, chunks)
    whole, rest = divmod(length, allowed[-1])
    return [allowed[-1]] * whole + (_fastest(rest, allowed) if rest else [])


def _fastest(rest: int, allowed: list[int]) -> list[int]:
    """The one or two chunks for fewer tokens than the largest holds that take the least time."""

    def padded(rest: int) -> int:
        return next(c for c in allowed if c >= rest)

    plans = [[padded(rest)], *([c, padded(rest - c)] for c in reversed(allowed) if TOKENS_OF_A_PROGRAM <= c < rest)]
    return min(plans, key=lambda sizes: sum(max(c, TOKENS_OF_A_PROGRAM) + TOKENS_OF_A_PROGRAM for c in sizes))


def common_length(prompt: Sequence[int], cached: Sequence[int]) -> int:
    """Tokens that both begin with; the prompt's last has to be read in any case."""
    low, high = 0, min(len(prompt) - 1, len(cached))
    while low < high:  # halving compares lists, where a loop over tokens would hold up the steps
        middle = (low + high + 1) // 2
        if prompt[low:middle] == cached[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
