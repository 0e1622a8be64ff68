"""Registry of the model families, by config.json's `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from adafuse_jax.models.families.cohere2 import COHERE2
from adafuse_jax.models.families.exaone4 import EXAONE4
from adafuse_jax.models.families.family import Family
from adafuse_jax.models.families.gemma import GEMMA2, GEMMA3
from adafuse_jax.models.families.glm4 import GLM4
from adafuse_jax.models.families.granite import GRANITE
from adafuse_jax.models.families.llama import LLAMA
from adafuse_jax.models.families.mistral import MINISTRAL3, MISTRAL
from adafuse_jax.models.families.olmo import OLMO2, OLMO3
from adafuse_jax.models.families.phi3 import PHI3
from adafuse_jax.models.families.qwen2 import QWEN2
from adafuse_jax.models.families.qwen3 import QWEN3
from adafuse_jax.models.families.seed_oss import SEED_OSS
from adafuse_jax.models.families.smollm3 import SMOLLM3

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gemma2": GEMMA2, "gemma3_text": GEMMA3,
    "granite": GRANITE, "olmo2": OLMO2, "olmo3": OLMO3, "smollm3": SMOLLM3, "phi3": PHI3, "glm4": GLM4,
    "exaone4": EXAONE4, "cohere2": COHERE2, "seed_oss": SEED_OSS, "ministral3": MINISTRAL3,
}  # fmt: skip
