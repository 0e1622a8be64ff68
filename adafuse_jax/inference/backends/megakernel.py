"""The megakernel backend: gates first, then all layers and the head by one kernel (`pallas_kernels.megakernel`).

    token → experts, gates (a table lookup where the router sees the token alone) → all layers and the head → logits

The experts stay beside the weights, y = W x + Σ_j g_j s B[e_j] (A[e_j] x), and of their factors only those in use are read;
or they are in the weights already, and the megakernel runs the bare backbone. Devices that share the model run it together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.prompts import is_routed_by_token
from adafuse_jax.adapters.stacked import StackedAdapters
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.adapter_bank import AdapterBank, Bucket
from adafuse_jax.inference.backends.base import Backend, StepOutput, dispatch_log_level
from adafuse_jax.inference.routing import GateTable, mixture_of, route, tabulate
from adafuse_jax.models.config import LINEARS, ModelConfig, unsupported_field
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import TokenExperts
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.layers import Norm
from adafuse_jax.models.quantised import head_quantisation_of, quantisation_of
from adafuse_jax.models.rotary import TABLE_FIELDS, layer_ropes, rope_tables
from adafuse_jax.parallel.axes import CACHE, TABLES, TENSOR, linear_axes, partition_spec
from adafuse_jax.parallel.mesh import mesh_of
from pallas_kernels.megakernel import Experts, Shape, Weights, decode_token, unsupported_reason
from pallas_kernels.megakernel.activations import ACTIVATIONS
from pallas_kernels.megakernel.op import NORM_PLACEMENTS
from pallas_kernels.megakernel.sizes import TILE_K
from pallas_kernels.quantised import QuantArray

log = logging.getLogger(__name__)

TRIED_DEVICES = 2
"""Devices that the megakernel has run on together, at most."""
CONSUMED_FIELDS = frozenset({
    *Shape.__dataclass_fields__,
    "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "sliding_windows", "norm",  # `weights_of`
    *TABLE_FIELDS, "local_rope", "nope_layers",  # cos and sin
    "embedding_multiplier", "logit_multiplier", "logit_softcap",  # before and after the launch
})  # fmt: skip
"""Fields of `ModelConfig` that reach the step; a model with any other is decoded by its own modules."""
SUPPORTED_VALUES: dict[str, Collection[str]] = {
    "norm": ("rms", "rms_1p"), "norm_placement": NORM_PLACEMENTS, "activation": ACTIVATIONS,
}  # fmt: skip
"""Field → its values that the kernel takes; those of the others are all right."""
IRRELEVANT_FIELDS = {
    "model_type": "families differ in the other fields",
    "max_position_embeddings": "the engine bounds the cache, and the kernel reads what is in it",
    "bos_token_id": "of prompts", "eos_token_ids": "the engine stops", "pad_token_id": "of batches",
}  # fmt: skip
"""Field → the reason why it cannot matter to the kernel."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Arrays that the step reads besides the model's, laid out once.

    `norms`: all norms in front of blocks and the last one, stacked; `output_norms`: those behind blocks, if there are any.
    `a`, `b`: the experts' factors, the adapter's own arrays or, if they have another dtype or the rank is no multiple of 64,
    copies padded with zeros. `table`: the gates of every token, if the router sees the token alone. `scales`: those of
    quantised linears, transposed: a tile's stand in a row. `head`: a copy, if a device's vocabulary is no multiple of 64,
    padded with zeros on each device; of a sharded model with tied embeddings, sharded over the vocabulary. `mesh`: of a
    sharded model. The factors of a bank are read from it."""

    norms: Float[Array, "2L+1 D"]
    a: dict[str, Float[Array, "L E R in"]]
    b: dict[str, Float[Array, "L E out R"]]
    table: GateTable | None
    output_norms: Float[Array, "2L D"] | None = None
    scales: dict[str, Float[Array, "L groups out"]] = field(default_factory=dict)
    head: Float[Array, "V D"] | None = None
    mesh: Mesh | None = field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, model: Backbone, adapter: AdaFuse | AdapterBank | None, *, merged: bool = False) -> Fused:
        """`merged`: the experts will be in the weights, so their factors are not read."""
        adapter = None if isinstance(adapter, AdapterBank) else adapter
        layers, dtype = model.layers, model.dtype
        inputs = _in_turn(layers.input_layernorm, layers.post_attention_layernorm)
        norms = [norm for norm in (inputs, model.norm.factor[None]) if norm is not None]
        experts = {} if adapter is None or merged else dict(adapter.experts.items())
        more = {name: -e.A.shape[2] % TILE_K for name, e in experts.items()}
        mesh, head = mesh_of(model), None
        if mesh is not None and model.lm_head is None:
            head = jax.device_put(model.embed_tokens[...], NamedSharding(mesh, partition_spec(TABLES["lm_head"])))
        shape = shape_of(model.config, 1 if mesh is None else mesh.size)
        if missing := shape.head_rows - shape.vocab_size:
            assert not isinstance(model.head, QuantArray), "refused before"
            head = _padded_shards(model.head if head is None else head, missing, mesh)
        return cls(
            norms=jnp.concatenate(norms),
            output_norms=_in_turn(layers.post_self_attn_layernorm, layers.post_mlp_layernorm),
            a={name: _padded(e.A[...].astype(dtype), 2, more[name]) for name, e in experts.items()},
            b={name: _padded(e.B[...].astype(dtype), 3, more[name]) for name, e in experts.items()},
            table=None if adapter is None or not is_routed_by_token(adapter) else tabulate(model, adapter),
            scales={
                name: weight.scales.swapaxes(1, 2)
                for name in LINEARS
                if isinstance(weight := getattr(layers, name).weight[...], QuantArray)
            },
            head=head,
            mesh=mesh,
        )


def weights_of(model: Backbone, fused: Fused) -> Weights:
    """The model's own arrays by name."""
    config, layers = model.config, model.layers
    head: Any = model.head if fused.head is None else fused.head
    windows = config.sliding_windows or (None,) * config.num_layers
    ropes, rope_of_layer = layer_ropes(config)
    linears = {name: getattr(layers, name) for name in LINEARS}
    weights = {name: linear.weight[...] for name, linear in linears.items()}
    return Weights(
        linears={n: w.codes if isinstance(w, QuantArray) else w for n, w in weights.items()} | {"lm_head": head},
        biases={name: linear.bias[...] for name, linear in linears.items() if linear.bias is not None},
        norms=fused.norms,
        output_norms=fused.output_norms,
        q_norm=None if layers.q_norm is None else layers.q_norm.factor,
        k_norm=None if layers.k_norm is None else layers.k_norm.factor,
        windows=jnp.array([w or jnp.iinfo(jnp.int32).max // 2 for w in windows], jnp.int32),
        ropes=jnp.array(rope_of_layer, jnp.int32) if len(ropes) > 1 else None,
        scales=fused.scales,
        layout=quantisation_of(model),
    )


def _in_turn(*norms: Norm | None) -> Float[Array, "NL D"] | None:
    """The factors of norms [L, D], those of a layer one after the other; None if there are none."""
    factors = [norm.factor for norm in norms if norm is not None]
    return jnp.stack(factors, axis=1).reshape(-1, factors[0].shape[-1]) if factors else None


def _padded(x: Array, axis: int, more: int) -> Array:
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x


def _padded_shards(head: Array, missing: int, mesh: Mesh | None) -> Array:
    """The head with `missing` rows of zeros behind the rows of each device."""
    pad, rows = partial(_padded, axis=0, more=missing), partition_spec(TABLES["lm_head"])
    return pad(head) if mesh is None else jax.shard_map(pad, mesh=mesh, in_specs=rows, out_specs=rows)(head)


def shape_of(config: ModelConfig, devices: int = 1) -> Shape:
    """Sizes of one device's shard."""
    shared = "hidden_dim", "num_heads", "num_kv_heads", "vocab_size"
    sizes = {name: getattr(config, name) for name in Shape.__dataclass_fields__}
    return Shape(**sizes | {name: sizes[name] // devices for name in shared})


def field_unsupported_reason(config: ModelConfig) -> str | None:
    """The part of `fused_unsupported_reason` that the equations of the model decide."""
    for rope in dict.fromkeys((config.rope, config.local_rope or config.rope)):
        if reason := unsupported_field(replace(config, rope=rope), CONSUMED_FIELDS | IRRELEVANT_FIELDS.keys()):
            return reason
    for name, values in SUPPORTED_VALUES.items():
        if (value := getattr(config, name)) not in values:
            return f"the model has {name} {value!r}, which it does not take"
    return None


def fused_unsupported_reason(
    model: Backbone, batch: int = 1, adapter: AdaFuse | AdapterBank | None = None, bucket: Bucket | None = None
) -> str | None:
    """The reason why the megakernel cannot decode `batch` rows with this model on its devices, or None. `adapter`: the one
    whose factors the kernel reads, or a bank, in its present bucket or another; None for the bare backbone."""
    if reason := field_unsupported_reason(model.config):
        return reason
    if (layout := head_quantisation_of(model)) is not None:
        return f"it reads a plain head, and this one is {layout.name}"
    device, mesh = next(iter(model.embed_tokens[...].devices())), mesh_of(model)
    if mesh is not None and (mesh.axis_names != (TENSOR,) or [*mesh.devices] != jax.local_devices()[: mesh.size]):
        return f"it runs on a mesh of one axis over the first devices of one process, and this is {mesh}"
    shape = shape_of(model.config, 1 if mesh is None else mesh.size)
    if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9."):
        return f"it needs a Hopper GPU, this is {device.device_kind}"
    options: dict[str, Any] = {"num_ctas": device.core_count, "layout": quantisation_of(model)}
    if adapter is None:
        return unsupported_reason(shape, model.dtype, batch, **options)
    if isinstance(adapter, AdapterBank):
        bucket = bucket or adapter.bucket
        settings: Any = bucket
        num_experts, targets = adapter.max_experts, bucket.targets
    else:
        settings = adapter.config
        num_experts, targets = adapter.config.num_experts, tuple(adapter.experts)
    return unsupported_reason(
        shape, model.dtype, batch, targets, rank=-(-settings.rank // TILE_K) * TILE_K,
        max_experts_used=min(num_experts, batch * settings.top_k), **options,
    )  # fmt: skip


def fused_step(
    model: Backbone,
    adapter: AdaFuse | StackedAdapters | None,
    fused: Fused,
    token: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: KVCache,
    **options: Any,
) -> tuple[Float[Array, "B V"], TokenExperts | None, KVCache]:
    """Read one token of every row: logits of the next (fp32), the experts that read it, the cache with it. `options` are
    those of `decode_token`."""
    config, experts, chosen = model.config, None, None
    if adapter is not None:
        chosen = route(model, adapter, fused.table, token, positions, cache)
        a, b = fused.a, fused.b
        if isinstance(adapter, StackedAdapters):
            a, b = ({name: getattr(e, factor)[...] for name, e in adapter.experts.items()} for factor in "AB")
        experts = Experts(a=a, b=b, mixture=mixture_of(adapter, chosen)) if a else None
    weights = weights_of(model, fused)
    tables = rope_tables(config, positions)
    if fused.mesh is None:
        run: Callable[..., Any] = partial(decode_token, shape_of(config), **options)
    else:
        run = _over_devices(fused.mesh, config, weights, experts, **options)
    logits, k, v = run(weights, experts, model.embed(token), cache.k, cache.v, positions, *tables)
    at = slice(None), jnp.arange(len(token)), positions
    written = (old.at[at].set(new, mode="drop") for old, new in ((cache.k, k), (cache.v, v)))
    return model.finished(logits), chosen, KVCache(*written)


def _over_devices(
    mesh: Mesh, config: ModelConfig, weights: Weights, experts: Experts | None, **options: Any
) -> Callable[..., Any]:
    """`decode_token` on all devices of the mesh, weights and cache sharded as in `axes`; the logits are replicated."""
    whole = PartitionSpec()

    def specs(leaf: str, arrays: dict[str, Array]) -> dict[str, PartitionSpec]:
        axes = {name: TABLES.get(name) or linear_axes(name, leaf) for name in arrays}
        return {name: partition_spec(of_array) for name, of_array in axes.items()}

    of_weights, of_experts = jax.tree.map(lambda _: whole, (weights, experts))
    of_weights.linears.update(specs("weight", weights.linears))
    of_weights.biases.update(specs("bias", weights.biases))
    for name in weights.scales:
        *layers_out, into = linear_axes(name, "weight")
        is_grouped = weights.layout is not None and weights.layout.group_size is not None
        of_weights.scales[name] = partition_spec((layers_out[0], into if is_grouped else "", layers_out[1]))
    if experts is not None:
        of_experts.a.update(specs("A", experts.a))
        of_experts.b.update(specs("B", experts.b))

    def token(*arguments: Any) -> tuple[Array, Array, Array]:
        axis = TENSOR if mesh.size > 1 else None
        return decode_token(shape_of(config, mesh.size), *arguments, axis=axis, **options)

    cache, new = partition_spec(CACHE), PartitionSpec(None, None, TENSOR)
    return jax.shard_map(
        token, mesh=mesh, in_specs=(of_weights, of_experts, whole, cache, cache, whole, whole, whole),
        out_specs=(whole, new, new), check_vma=False,
    )  # fmt: skip


def default_unsupported_reason(model: Backbone, adapter: Any = None) -> str | None:
    """The reason why the megakernel is no default, or None: it cannot run, or was never tested over several devices so."""
    reason, mesh = fused_unsupported_reason(model, adapter=adapter), mesh_of(model)
    if reason is not None or mesh is None or mesh.size == 1:
        return reason
    if quantisation_of(model) is not None or shape_of(model.config).has_output_norms:
        return "over several devices it must be asked for, if weights are quantised or norms stand behind blocks"
    return f"over more than {TRIED_DEVICES} devices it must be asked for" if mesh.size > TRIED_DEVICES else None


class Megakernel(Backend):
    """All layers and the head by one kernel, for AdaFuse, a bank of adapters or the bare model.

    `fallback` decodes batches that the kernel cannot, or not as fast; without one the former are refused.
    """

    requires = "pre_gated"
    takes_bank = True
    reads_quantised = True
    takes_wider_cache = True

    def __init__(self, model: Backbone, adapter: Any, strategy: str = "fused", fallback: Backend | None = None):
        self._model, self._adapter, self.strategy, self._fallback = model, adapter, strategy, fallback
        self._reads = model, adapter, Fused.of(model, adapter)
        self._reasons: dict[int, str | None] = {}
        if isinstance(adapter, AdapterBank):
            adapter.reserve(Bucket(rank=TILE_K))

    @classmethod
    def unsupported_reason(cls, model: Backbone, adapter: Any, batch: int = 1) -> str | None:
        return fused_unsupported_reason(model, batch, adapter)

    def for_batch(self, batch: int) -> Backend:
        if batch not in self._reasons:
            reason = self.unsupported_reason(self._model, self._adapter, batch)
            if self._fallback is not None:
                why = self._fallback.faster_reason(batch) if reason is None else f"the megakernel cannot, as {reason}"
                if why is not None:
                    log.log(dispatch_log_level(), "decoding %d prompts unfused: %s", batch, why)
                reason = why
            self._reasons[batch] = reason
            if reason is None and self.bank is not None:
                self.bank.limit(partial(fused_unsupported_reason, self._model, batch, self.bank))
        if (reason := self._reasons[batch]) is None:
            return self
        if self._fallback is None:
            raise UserError(
                f"strategy {self.strategy} cannot run: {reason}; decode fewer prompts together, or unmerged"
            )
        return self._fallback.for_batch(batch)

    @staticmethod
    def step(
        reads: Any,
        carry: Any,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        cache: KVCache,
        hold: Bool[Array, " B"],
    ) -> StepOutput:
        model, adapter, fused = reads
        return *fused_step(model, adapter, fused, token, position, cache), carry
