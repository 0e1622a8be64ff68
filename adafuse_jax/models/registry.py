"""Registry of the model families, by config.json's `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from adafuse_jax.models.families.family import Family
from adafuse_jax.models.families.llama import LLAMA
from adafuse_jax.models.families.mistral import MISTRAL
from adafuse_jax.models.families.qwen2 import QWEN2
from adafuse_jax.models.families.qwen3 import QWEN3

FAMILIES: Mapping[str, Family] = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
