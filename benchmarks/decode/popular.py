"""Shapes of models that people use, as their config.json has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from adafuse_jax.models.config import ModelConfig
from benchmarks.decode.costs import SIZES, Shapes
from benchmarks.decode.models import model_config

FEATURES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}
}  # fmt: skip
"""`model_type` → features of its block beside Llama's."""


@dataclass(frozen=True, kw_only=True)
class ModelShapes(Shapes):
    """Shapes of a family. `head_dim` of 0: the embedding over the heads."""

    model_type: str = "llama"
    head_dim: int = 0
    tied: bool = False

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        head_dim, d = self.head_dim or self.embed_dim // self.num_heads, self.embed_dim
        q, kv = self.num_heads * head_dim, (self.num_kv_heads or self.num_heads) * head_dim
        of_attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        return of_attention.get(name) or super().linear_shape(name)

    def config(self) -> ModelConfig:
        shapes, features = model_config(self), FEATURES[self.model_type]
        return replace(
            shapes, head_dim=self.head_dim or shapes.head_dim, tie_word_embeddings=self.tied,
            model_type=self.model_type, **features,
        )  # fmt: skip


def _of(name: str, layers: int, dims: tuple[int, int], heads: tuple[int, int], vocab: int, **more: Any) -> ModelShapes:
    """`dims` are those of the embedding and of the FFN, `heads` those of queries and of keys."""
    return ModelShapes(
        name=name, num_layers=layers, embed_dim=dims[0], hidden_dim=dims[1], num_heads=heads[0], num_kv_heads=heads[1],
        vocab_size=vocab, **more,
    )  # fmt: skip


QWEN, SMALL = 151936, {"rank": 16, "alpha": 32.0}
MODELS = (
    _of("SmolLM2-135M", 30, (576, 1536), (9, 3), 49152, tied=True, **SMALL),
    _of("Qwen2.5-0.5B", 24, (896, 4864), (14, 2), QWEN, tied=True, model_type="qwen2", **SMALL),
    _of("Llama-3.2-1B", 16, (2048, 8192), (32, 8), 128256, tied=True),
    _of("Qwen3-4B", 36, (2560, 9728), (32, 8), QWEN, tied=True, model_type="qwen3", head_dim=128),
    _of("Mistral-7B", 32, (4096, 14336), (32, 8), 32768, model_type="mistral"),
    _of("Llama-3-8B", 32, (4096, 14336), (32, 8), 128256),
    _of("Qwen3-8B", 36, (4096, 12288), (32, 8), QWEN, model_type="qwen3", head_dim=128),
    _of("Qwen3-14B", 40, (5120, 17408), (40, 8), QWEN, model_type="qwen3", head_dim=128),
    _of("Qwen3-32B", 64, (5120, 25600), (64, 8), QWEN, model_type="qwen3", head_dim=128),
)
POPULAR = {
    "Llama-2-7B": ModelShapes(**vars(SIZES["llama2-7b"])),
    **{shapes.name: shapes for shapes in MODELS},
    "tiny": ModelShapes(**vars(SIZES["tiny"]) | {"num_kv_heads": 2}),
}
"""Adapters have 8 experts, two of them per token, of rank 64; in models of less than 1B parameters of rank 16."""
