"""Shapes of the models that train in `benchmarks.training`, and of their adapters."""

from __future__ import annotations

from dataclasses import dataclass

from adafuse_jax.models.config import ModelConfig
from benchmarks.decode.costs import SIZES, Shapes


@dataclass(frozen=True, kw_only=True)
class TrainingShapes(Shapes):
    num_kv_heads: int = 0
    tied: bool = False


LLAMA2 = SIZES["llama2-7b"]
SHAPES = {
    "llama2-7b": TrainingShapes(**vars(LLAMA2), num_kv_heads=LLAMA2.num_heads),
    "smollm2-135m": TrainingShapes(
        name="smollm2-135m", num_layers=30, embed_dim=576, hidden_dim=1536, num_heads=9, num_kv_heads=3, vocab_size=49152,
        tied=True, rank=16, alpha=32.0,
    ),
    "tiny": TrainingShapes(**vars(SIZES["tiny"]), num_kv_heads=2),
}  # fmt: skip


def model_config(shapes: TrainingShapes) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=shapes.vocab_size, embed_dim=shapes.embed_dim, hidden_dim=shapes.hidden_dim,
        num_layers=shapes.num_layers, num_heads=shapes.num_heads, num_kv_heads=shapes.num_kv_heads,
        head_dim=shapes.embed_dim // shapes.num_heads, tie_word_embeddings=shapes.tied, norm_eps=1e-5,
        max_position_embeddings=shapes.max_position_embeddings,
    )  # fmt: skip
