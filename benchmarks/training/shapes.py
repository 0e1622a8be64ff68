"""Shapes of the models that train in `benchmarks.training`, and of their adapters. Nothing here needs JAX or torch."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.decode.costs import SIZES, Shapes

LEARNING_RATE, CURVE_LEARNING_RATE = 1e-4, 3e-3
"""Learning rates: of the rows, and of the small model, whose losses are to move."""
CURVE_STEPS = 20
"""Steps whose losses are compared."""


@dataclass(frozen=True, kw_only=True)
class TrainingShapes(Shapes):
    tied: bool = False


SHAPES = {
    **{name: TrainingShapes(**vars(SIZES[name])) for name in ("llama2-7b", "llama2-13b", "llama2-70b")},
    "smollm2-135m": TrainingShapes(
        name="smollm2-135m", num_layers=30, embed_dim=576, hidden_dim=1536, num_heads=9, num_kv_heads=3, vocab_size=49152,
        tied=True, rank=16, alpha=32.0,
    ),
    "tiny": TrainingShapes(**vars(SIZES["tiny"]) | {"alpha": 16.0, "num_kv_heads": 2}),
}  # fmt: skip
