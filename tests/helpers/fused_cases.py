"""Random models, adapters and caches for one step of the megakernel, and the same step by the model's own modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.models.config import LINEARS, ModelConfig, RopeConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.quantised import quantised
from pallas_kernels.megakernel import Shape
from pallas_kernels.megakernel.plan import make_plan
from pallas_kernels.quantised import QuantLayout


@dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 1
    slots: int = 128
    position: int = 70
    targets: tuple[str, ...] = ()
    rank: int = 64
    top_k: int = 2
    num_experts: int = 4
    window: int | None = None
    num_layers: int = 1
    embed_dim: int = 128
    hidden_dim: int = 192
    heads: tuple[int, int, int] = (4, 2, 64)  # query, key-value, dimensions
    vocab_size: int = 256
    bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    layout: QuantLayout | None = None
    """Layout of the linears' codes, if they are quantised."""
    features: tuple[tuple[str, Any], ...] = ()
    """Other fields of `ModelConfig`."""


GRANITE = Case(
    vocab_size=259, tied=True, targets=("o_proj", "down_proj"),
    features=(
        ("embedding_multiplier", 12.0), ("residual_multiplier", 0.22), ("attention_multiplier", 0.05),
        ("logit_multiplier", 0.2),
    ),
)  # fmt: skip
"""No multiple of 64 tokens: the head's last tile has rows beyond them."""
GEMMA = Case(
    num_layers=2, heads=(4, 1, 256), qk_norm=True, tied=True, targets=("q_proj", "o_proj", "gate_proj", "down_proj"),
    features=(
        ("norm", "rms_1p"), ("norm_placement", "both"), ("activation", "gelu_pytorch_tanh"), ("embedding_multiplier", 11.3),
        ("attention_multiplier", 0.05), ("attention_softcap", 2.0), ("logit_softcap", 3.0),
        ("sliding_windows", (40, None)), ("local_rope", RopeConfig(theta=100.0)), ("rope", RopeConfig(theta=1e6)),
    ),
)  # fmt: skip
"""The equations of Gemma 3, and the soft caps of Gemma 2."""


def make(case: Case, seed: int = 0) -> tuple[Backbone, AdaFuse | None, KVCache, jax.Array, jax.Array]:
    """(model, adapter, a cache full of random numbers, tokens, positions), in bfloat16."""
    heads, kv, head_dim = case.heads
    config = ModelConfig(
        model_type="llama", vocab_size=case.vocab_size, embed_dim=case.embed_dim, hidden_dim=case.hidden_dim,
        num_layers=case.num_layers, num_heads=heads, num_kv_heads=kv, head_dim=head_dim, max_position_embeddings=4096,
        norm_eps=1e-5, qkv_bias=case.bias, o_bias=case.bias, mlp_bias=case.bias, qk_norm=case.qk_norm,
        tie_word_embeddings=case.tied,
        **{"sliding_windows": (case.window,) * case.num_layers if case.window else ()} | dict(case.features),
    )  # fmt: skip
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], scale: float, center: float = 0.0) -> jax.Array:
        return jnp.asarray((center + scale * rng.normal(size=shape)).astype(jnp.bfloat16))

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return draw(leaf.shape, 0.2, 1.0) if "norm" in name else draw(leaf.shape, 0.08)

    model = Backbone(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = jax.tree_util.tree_map_with_path(fill, model)
    if case.layout is not None:
        model = quantised(model, case.layout)
    adapter = None
    if case.targets:
        settings = AdapterConfig(
            targets=case.targets, num_experts=case.num_experts, rank=case.rank, top_k=case.top_k, alpha=2.0 * case.rank
        )
        adapter = AdaFuse(settings, config, rngs=nnx.Rngs(1))
        adapter.experts = jax.tree.map(lambda leaf: draw(leaf.shape, 0.05), adapter.experts)
    shape = (case.num_layers, case.batch, case.slots, kv, head_dim)
    tokens = jnp.asarray(rng.integers(0, case.vocab_size, case.batch), jnp.int32)
    positions = jnp.asarray([max(0, case.position - 7 * row) for row in range(case.batch)], jnp.int32)
    return model, adapter, KVCache(draw(shape, 1.0), draw(shape, 1.0)), tokens, positions


def by_modules(model, adapter, cache, tokens, positions):
    out = model.run(tokens[:, None], adapter=adapter, positions=positions[:, None], cache=cache, unroll=True)
    return model.logits(out.hidden[:, 0]), out.routing, out.cache


def in_fp32(tree):
    """The tree with float32 in place of bfloat16, converted by NumPy: JAX would compile a program for each shape."""
    return jax.tree.map(lambda x: jnp.asarray(np.float32(x)) if x.dtype == jnp.bfloat16 else x, tree)


LLAMA2_7B = Shape(
    num_layers=32, embed_dim=4096, hidden_dim=11008, num_heads=32, num_kv_heads=32, head_dim=128, vocab_size=32000,
    norm_eps=1e-5,
)  # fmt: skip
SMOLLM2 = Shape(
    num_layers=30,
    embed_dim=576,
    hidden_dim=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    norm_eps=1e-5,
)


def plan_of(shape: Shape, **changes: Any) -> Any:
    options = {
        "adapted": LINEARS, "batch": 1, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "cache_slots": 512,
        "max_experts_used": 2, "rank": 64, "num_ctas": 132,
    }  # fmt: skip
    return make_plan(shape.linears(), **(options | changes))
