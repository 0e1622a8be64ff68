"""The GPUs that kernels in Triton are for."""

from __future__ import annotations

import jax

MIN_CAPABILITY = 8


def is_recent(capability: str) -> bool:
    """True for NVIDIA's '8.0' or above; AMD's capabilities are names."""
    major = capability.partition(".")[0]
    return major.isdecimal() and int(major) >= MIN_CAPABILITY


def default_capability() -> str:
    """Compute capability of the default device; empty where it is no GPU."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def triton_unsupported_reason(device: jax.Device) -> str | None:
    """The reason why kernels in Pallas' Triton are not for this device, or None."""
    if device.platform == "gpu" and is_recent(str(getattr(device, "compute_capability", ""))):
        return None
    return f"they need an NVIDIA GPU of compute capability {MIN_CAPABILITY}.0 or newer, this is {device.device_kind}"
