"""Strategies that merge experts into the weights, and the adapters that they are tested with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import quick
from random_models import random_adapter

import benchmarks.simple_merging  # noqa: F401 - registers the strategy
from adafuse_jax import Backbone
from adafuse_jax.models.config import LINEARS

MERGING = ("golden", "switch", "simple")


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    targets: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("q_v", "llama_gqa", ("q_proj", "v_proj")),
    Case("all_biases", "llama_bias", LINEARS),
    Case("all_qkv_bias_tied", "qwen2_tied", LINEARS, {"top_k": 3}),
    Case("ffn", "qwen2_window", ("gate_proj", "up_proj", "down_proj")),
    Case("o_first", "mistral_window", ("o_proj", "down_proj"), {"top_k": 1}),
    Case("down", "qwen3", ("down_proj",)),
    Case("not_renormalized", "llama_mqa", LINEARS, {"renormalize": False}),
]
cases = pytest.mark.parametrize("case", quick.first(CASES, 2), ids=[case.name for case in CASES])
strategies = pytest.mark.parametrize("strategy", MERGING)


def copied(model: Backbone) -> Backbone:
    """Copy of the weights for *switch*, which takes over those it is given."""
    return jax.tree.map(jnp.copy, model)


def adapted(case: Case, models) -> tuple[Backbone, Any]:
    model = models(case.family)
    return model, random_adapter(model.config, targets=case.targets, **case.settings)
