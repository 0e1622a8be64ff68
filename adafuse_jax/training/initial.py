"""The state at step 0: random factors with B = 0, or those of a LoRA, or the backbone itself; fresh moments; keys."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Key

from adafuse_jax.adapters.baselines.full import FullWeights
from adafuse_jax.adapters.baselines.layerwise import LayerWise
from adafuse_jax.adapters.baselines.pesc import PESC
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.adapters.registry import AnyAdapter, make_adapter
from adafuse_jax.checkpoints.adapter_directory import load_adapter
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import Quantisation
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import TrainState


def initial_state(
    config: AdapterConfig,
    model: Backbone,
    lora: LoRA | None,
    optimizer: optax.GradientTransformation,
    phases: Phases,
    key: Key[Array, ""],
) -> TrainState:
    """The state at step 0; `key` draws the initial values and then the dropout."""
    init_key, state_key = jax.random.split(key)
    adapter = phases.initial(initial_weights(config, model, lora, init_key))
    return TrainState(step=jnp.int32(0), adapter=adapter, moments=optimizer.init(adapter), key=state_key)


def initial_weights(
    config: AdapterConfig, model: Backbone, lora: LoRA | None, key: Key[Array, ""]
) -> AnyAdapter | FullWeights:
    """Trainable weights at step 0. With `lora` every expert is that LoRA, so that any gates that sum to 1 give its output:

    A_e = A,    B_e = B · s_lora / s
    """
    if config.adapter == "full":
        return FullWeights(config, model)
    adapter = make_adapter(config, model.config, rngs=nnx.Rngs(params=key))
    if lora is None or isinstance(adapter, PESC):
        return adapter
    num_experts: Any = config.max_experts or 1
    if isinstance(adapter, LayerWise):
        num_experts = jnp.array(adapter.layer_experts)[:, None]  # [L, 1]
    for name, one in lora.experts.items():
        experts: LoRAExperts = adapter.experts[name].lora if isinstance(adapter, LayerWise) else adapter.experts[name]
        is_valid = (jnp.arange(experts.A.shape[1]) < num_experts)[..., None, None]  # [(L,) E, 1, 1]
        experts.A[...] = jnp.where(is_valid, one.A[...], 0)
        experts.B[...] = jnp.where(is_valid, one.B[...] * (lora.config.scale / config.scale), 0)
    return adapter


def read_initial_lora(
    directory: str,
    config: AdapterConfig,
    model: ModelConfig,
    *,
    backbone_identity: str,
    quantization: Quantisation | None = None,
) -> LoRA:
    """The LoRA of `--init-lora`. Raises `UserError` if it is none, or does not fit the adapter."""
    where = f"--init-lora {directory}"
    if config.adapter in ("pesc", "full", "none"):
        raise UserError(
            f"{where}: --adapter {config.adapter} has no linear experts that could begin as a LoRA; leave it out"
        )
    lora = load_adapter(
        directory, model, backbone_identity=backbone_identity, dtype=jnp.dtype("float32"), quantization=quantization
    )
    if not isinstance(lora, LoRA):
        raise UserError(f"{where}: is an adapter of {lora.config.adapter}; give a LoRA")
    if lora.config.rank != config.rank:
        raise UserError(
            f"{where}: has rank {lora.config.rank} and the experts {config.rank}; give --rank {lora.config.rank}"
        )
    extra = [name for name in lora.config.targets if name not in config.targets]
    if extra:
        raise UserError(f"{where}: adapts {extra[0]}, which is not among --targets; give --targets with it")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lora)):
        raise UserError(f"{where}: holds NaN or infinite values; give another one")
    return lora


def digest(lora: LoRA | None) -> Any:
    """SHA-256 of a LoRA, for the identity of the runs that begin from it."""
    if lora is None:
        return None
    found = hashlib.sha256(str(lora.config.table()).encode())
    for leaf in jax.tree.leaves(lora):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
