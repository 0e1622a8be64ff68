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
    from adafuse_jax.adapters.methods import make_adapter
    from adafuse_jax.configs import AdapterConfig, DecodeConfig, ModelConfig, TrainConfig
    from adafuse_jax.core.errors import UserError
    from adafuse_jax.interop.huggingface import export_backbone, load_backbone
    from adafuse_jax.model.backbone import Backbone

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
    "adapters.methods": ("make_adapter",),
    "configs": ("AdapterConfig", "DecodeConfig", "ModelConfig", "TrainConfig"),
    "core.errors": ("UserError",),
    "interop.huggingface": ("export_backbone", "load_backbone"),
    "model.backbone": ("Backbone",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
