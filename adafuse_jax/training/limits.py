"""The refusal, before a run begins, of batches that the model or the memory cannot hold."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.parallel.axes import DATA, FSDP
from adafuse_jax.training.config import TrainConfig

BYTES_PER_TOKEN = 13
"""Host memory of a token in `Rows` and `Batch`: three int32 arrays and a mask."""


def require_context(config: TrainConfig, model: ModelConfig) -> None:
    """Raise `UserError` for rows longer than the model's context."""
    if config.max_length > model.context_length:
        raise UserError(
            f"--max-length {config.max_length} exceeds the {model.context_length} positions of {config.model}; lower it"
        )


def require_memory(config: TrainConfig, model: ModelConfig, mesh: Mesh | None = None) -> None:
    """Raise `UserError` for a step that cannot fit: from below, only a batch's arrays and every layer's input, which the
    backward pass needs, are counted. A step that is too large by less runs out of memory in its first execution."""
    tokens = config.batch_size * config.max_length if config.packing else config.batch_size
    host = config.grad_accum * tokens * BYTES_PER_TOKEN // jax.process_count()
    of_device = tokens if mesh is None else tokens // (mesh.shape[DATA] * mesh.shape[FSDP])
    device = of_device * model.embed_dim * model.num_layers * jnp.dtype(config.dtype).itemsize
    for need, available in ((host, host_memory()), (device, device_memory())):
        if available is not None and need > available:
            raise UserError(
                f"--batch-size {config.batch_size}: a step of {config.grad_accum} × {config.batch_size} sequences needs at "
                f"least {need / 1e9:.3g} GB of memory, {available / 1e9:.3g} GB are there; lower --batch-size, "
                "--grad-accum or --max-length"
            )


def device_memory() -> int | None:
    """Bytes of the first device; of a CPU the host's. None where neither is known."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or host_memory()


def host_memory() -> int | None:
    """Bytes of this machine, or of the control group that this process is in."""
    found = []
    with contextlib.suppress(ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            found.append(int(Path(path).read_text()))
    return min(found, default=None)
