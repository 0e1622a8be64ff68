"""AdaFuse in JAX: token-level pre-gated mixtures of LoRA experts.

Axis letters, used everywhere in shapes and einsums:

    B batch   T query length   S key/cache length   D embed   F hidden (FFN)   N query heads   K kv heads   H head_dim
    V vocabulary   L layers   E experts   R LoRA rank   k = top_k (lower case)

The public names are imported when they are first used: the package itself loads no library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adafuse_jax.adapters.adafuse import AdaFuse
    from adafuse_jax.adapters.config import AdapterConfig
    from adafuse_jax.adapters.registry import make_adapter
    from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
    from adafuse_jax.checkpoints.hf_export import export_backbone
    from adafuse_jax.core.errors import UserError
    from adafuse_jax.inference.config import DecodeConfig
    from adafuse_jax.models.config import ModelConfig
    from adafuse_jax.models.decoder import Backbone
    from adafuse_jax.training.config import TrainConfig

__all__ = [
    "AdaFuse",
    "AdapterConfig",
    "Backbone",
    "DecodeConfig",
    "ModelConfig",
    "TrainConfig",
    "UserError",
    "export_backbone",
    "load_backbone",
    "make_adapter",
]

_MODULES = {
    "adapters.adafuse": ("AdaFuse",),
    "adapters.registry": ("make_adapter",),
    "adapters.config": ("AdapterConfig",),
    "inference.config": ("DecodeConfig",),
    "models.config": ("ModelConfig",),
    "training.config": ("TrainConfig",),
    "core.errors": ("UserError",),
    "checkpoints.hf_checkpoint": ("load_backbone",),
    "checkpoints.hf_export": ("export_backbone",),
    "models.decoder": ("Backbone",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
