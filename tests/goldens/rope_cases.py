"""RoPE of one head of each kind, as keys of config.json. NumPy only: the reference environment and the project's share this.

`module` is the module of transformers whose rotary embedding and rotation of q and k is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

HEAD_DIM, HEADS, ORIGINAL = 16, 1, 32
LENGTHS = (20, 48)
"""Tokens of a sequence within the original length, and of one past it."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.1, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 1.3, 2.0, 3.5, 5.0, 8.0, 12.0, 16.0],
}


@dataclass(frozen=True, kw_only=True)
class RopeCase:
    keys: dict[str, Any] = field(hash=False)
    module: str = "llama"
    layer_type: str | None = None


def _old(**scaling: Any) -> dict[str, Any]:
    return {"rope_theta": 1000.0, "rope_scaling": scaling}


def _new(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **parameters}}


CASES = {
    "yarn_old": RopeCase(keys=_old(**YARN)),
    "yarn_new": RopeCase(keys=_new(**YARN, beta_fast=8.0, beta_slow=2.0, truncate=False)),
    "yarn_mscale": RopeCase(keys=_new(**YARN, mscale=0.7, mscale_all_dim=1.3)),
    "yarn_attention_factor": RopeCase(keys=_old(**YARN, attention_factor=1.4)),
    "yarn_outer_length": RopeCase(keys=_old(**YARN) | {"original_max_position_embeddings": 24}),
    "dynamic_old": RopeCase(keys=_old(type="dynamic", factor=3.0) | {"max_position_embeddings": ORIGINAL}),
    "dynamic_new": RopeCase(keys=_new(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": ORIGINAL}),
    "longrope_old": RopeCase(keys=_old(**LONG) | {"original_max_position_embeddings": ORIGINAL}),
    "longrope_new": RopeCase(keys=_new(**LONG, original_max_position_embeddings=ORIGINAL, factor=4.0)),
    "longrope_partial": RopeCase(
        module="phi3",
        keys=_old(**{name: value[:6] if isinstance(value, list) else value for name, value in LONG.items()})
        | {"original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 0.75},
    ),
    "partial_interleaved": RopeCase(module="glm4", keys=_new(rope_type="default", partial_rotary_factor=0.5)),
    "interleaved": RopeCase(module="cohere2", keys=_old(type="linear", factor=2.0)),
    "scaled_queries": RopeCase(
        module="ministral3",
        keys=_new(**YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3, max_position_embeddings=128),
    ),
    "local_layers": RopeCase(
        module="gemma3",
        layer_type="sliding_attention",
        keys={
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ),
    "global_layers": RopeCase(
        module="gemma3",
        layer_type="full_attention",
        keys={
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ),
}


def config(case: RopeCase) -> dict[str, Any]:
    """The keys of config.json that matter here."""
    return {"hidden_size": HEADS * HEAD_DIM, "num_attention_heads": HEADS, "max_position_embeddings": 128} | case.keys


def heads(length: int) -> np.ndarray:
    """Queries or keys [length, heads, H]."""
    rng = np.random.default_rng(length)
    return rng.standard_normal((length, HEADS, HEAD_DIM), np.float32)
