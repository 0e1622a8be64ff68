"""AdaFuse in JAX: token-level pre-gated mixtures of LoRA experts.

Axis letters, used everywhere in shapes and einsums:

    B batch   T query length   S key/cache length   D embed   F hidden (FFN)   N query heads   K kv heads   H head_dim
    V vocabulary   L layers   E experts   R LoRA rank   k = top_k (lower case)
"""

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
