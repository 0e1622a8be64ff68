"""The decoding strategies by name, and the one place that decides which of them decodes."""

from __future__ import annotations

import logging

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.backends.base import Backend, dispatch_log_level
from adafuse_jax.inference.backends.megakernel import Megakernel, default_unsupported_reason
from adafuse_jax.inference.backends.merged import Golden, MergedLoRA, Switch
from adafuse_jax.inference.backends.unfused import Unfused
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import quantisation_of
from adafuse_jax.parallel.mesh import mesh_of
from pallas_kernels.quantised import QuantLayout

log = logging.getLogger(__name__)

BACKENDS: dict[str, type[Backend]] = {
    "fused": Megakernel, "unmerged": Unfused, "golden": Golden, "switch": Switch, "merged": MergedLoRA
}  # fmt: skip
"""Strategy → backend. A module outside the product registers its own here (benchmarks/simple_merging.py)."""


def strategies_of(config: AdapterConfig) -> tuple[str, ...]:
    """The strategies that can decode with an adapter of this method."""
    capabilities = PRESETS[config.adapter].capabilities
    return tuple(name for name, backend in BACKENDS.items() if backend.requires in (None, *capabilities))


def require_strategy(config: AdapterConfig, strategy: str) -> None:
    """Raise `UserError` unless an adapter of this method can decode so."""
    fitting = strategies_of(config)
    if strategy not in fitting:
        raise UserError(
            f"--strategy {strategy} does not fit an adapter of {config.adapter}; it decodes {' or '.join(fitting)}"
        )


def require_reads_quantised(strategy: str, layout: QuantLayout | None) -> None:
    """Raise `UserError` if the backbone's linears are quantised, and the strategy needs them whole."""
    if reason := _quantised_reason(strategy, layout):
        raise UserError(f"strategy {strategy} cannot run: {reason}; decode unmerged, or with plain weights")


def _quantised_reason(strategy: str, layout: QuantLayout | None) -> str | None:
    if layout is None or BACKENDS[strategy].reads_quantised:
        return None
    return f"it would merge experts into {layout.name} weights, whose codes cannot hold them"


def choose_backend(strategy: str | None, model: Backbone, adapter: AnyAdapter | AdapterBank | None) -> Backend:
    """The backend of a strategy, prepared. None: *fused* where it can run, on `TRIED_DEVICES` at most, and batches that it
    cannot decode, or not as fast, unmerged; else *unmerged*. The choice is logged.

    Raises `UserError` for an unknown strategy, one that merges and no adapter, one that does not fit the adapter or several
    devices, and one that cannot run.
    """
    if strategy is None:
        return _default(model, adapter)
    if strategy not in BACKENDS:
        raise UserError(f"strategy {strategy!r} is none of {', '.join(BACKENDS)}")
    backend, mesh = BACKENDS[strategy], mesh_of(model)
    if backend.one_row and mesh is not None:
        raise UserError(f"strategy {strategy} runs on one device, and the model is on {mesh.size}; decode unmerged")
    if isinstance(adapter, AdapterBank):
        if not backend.takes_bank:
            raise UserError(
                f"strategy {strategy} merges one adapter, and rows have their own; decode fused or unmerged"
            )
    elif adapter is not None:
        require_strategy(adapter.config, strategy)
    elif backend.needs_adapter:
        raise UserError(f"strategy {strategy} merges the experts of an adapter; give one, or decode unmerged")
    require_reads_quantised(strategy, quantisation_of(model))
    if (reason := backend.unsupported_reason(model, adapter)) is not None:
        raise UserError(f"strategy {strategy} cannot run: {reason}; decode unmerged")
    return backend.prepare(model, adapter)


def _default(model: Backbone, adapter: AnyAdapter | AdapterBank | None) -> Backend:
    unfused = Unfused(model, adapter)
    if isinstance(adapter, AnyAdapter) and "fused" not in strategies_of(adapter.config):
        log.log(dispatch_log_level(), "decoding unmerged")
        return unfused
    reason = default_unsupported_reason(model, adapter)
    if reason is not None:
        log.log(dispatch_log_level(), "decoding unmerged: fused is not used, as %s", reason)
        return unfused
    log.log(dispatch_log_level(), "decoding fused")
    return Megakernel(model, adapter, fallback=unfused)
