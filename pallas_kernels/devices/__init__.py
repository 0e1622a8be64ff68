"""The devices that the kernels in Pallas' Triton are for."""

from __future__ import annotations

import jax

MIN_CAPABILITY = 8


def triton_unsupported_reason(device: jax.Device) -> str | None:
    """The reason why kernels in Pallas' Triton are not for this device, or None. AMD's capabilities are names."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if device.platform == "gpu" and major.isdecimal() and int(major) >= MIN_CAPABILITY:
        return None
    return f"they need an NVIDIA GPU of compute capability {MIN_CAPABILITY}.0 or newer, this is {device.device_kind}"
