"""Tiny models of every family with each kind of RoPE that it has, read past their original length.

Each is a case of `tiny_models` or `family_models` with other keys of RoPE: those of transformers 5 (`rope_parameters`) in
every second one, else those of transformers 4 (`rope_theta` with `rope_scaling`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from goldens import family_models, tiny_models
from goldens.tiny_models import Case

ORIGINAL, LENGTHS = 32, (20, 48)
"""The original length, and tokens of a text within it and of one past it."""
BASES = {"llama": "llama_bias", "mistral": "mistral_window", "qwen2": "qwen2_tied", "qwen3": "qwen3_bias"}
BASES |= {family: f"{family}_0" for family in family_models.FAMILIES}
KINDS = ("yarn", "dynamic", "longrope")
LACKING = {("phi3", "yarn"), ("phi3", "dynamic"), ("ministral3", "dynamic")}
THETA, LOCAL_THETA = 1000.0, 500.0


def case_of(family: str, kind: str, *, is_new: bool) -> Case:
    """The family's model with RoPE of this kind, in the keys of transformers 5 if `is_new`."""
    base = (tiny_models.CASES | family_models.CASES)[BASES[family]]
    config = {name: value for name, value in base.config.items() if not name.startswith("rope_")}
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    share = {"partial_rotary_factor": 0.5} if family == "glm4" else {}
    pairs = int(head_dim * share.get("partial_rotary_factor", 1)) // 2
    keys: dict[str, Any] = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        keys |= {name: np.linspace(1, end, pairs).tolist() for name, end in (("short_factor", 1.7), ("long_factor", 9))}
    if kind != "dynamic":
        keys["original_max_position_embeddings"] = ORIGINAL
    if family == "ministral3":
        keys["llama_4_scaling_beta"] = 0.1
    config |= {"max_position_embeddings": ORIGINAL if kind == "dynamic" else 128}
    if family == "phi3":
        config["original_max_position_embeddings"] = ORIGINAL
    if is_new or family == "ministral3":  # which transformers 4 does not have
        keys |= {"rope_theta": THETA} | share
        if family in ("gemma3_text", "olmo3"):
            local = {"rope_type": "default", "rope_theta": LOCAL_THETA}
            keys = {"full_attention": keys, "sliding_attention": local}
        config["rope_parameters"] = keys
    else:
        config |= {"rope_theta": THETA, "rope_scaling": keys} | share
    return replace(base, name=f"{family}_{kind}", config=config, num_shards=1)


CASES = {
    case.name: case
    for i, family in enumerate(BASES)
    for j, kind in enumerate(KINDS)
    if (family, kind) not in LACKING
    for case in (case_of(family, kind, is_new=(i + j) % 2 == 1),)
}


def tokens(case: Case, length: int) -> np.ndarray:
    """A text [T]."""
    return np.random.default_rng(length).integers(3, case.config["vocab_size"], length, np.int32)


def write_model_dir(case: Case, out: Path) -> Path:
    of = family_models if case.config["model_type"] in family_models.FAMILIES else tiny_models
    return of.write_model_dir(case, out)
