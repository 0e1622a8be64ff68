"""Model FLOPs utilisation (MFU): the arithmetic that a token needs at least, as a share of what the devices can do.

    MFU = c · N · tokens per second / Σ peak,   N: parameters of the backbone's linears and head

c is 4 for a frozen backbone, 2 each for the forward pass and the gradients of activations; 6 where it trains. Attention, the
adapter and what is recomputed do not count. There is none on devices whose peak is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adafuse_jax.models.config import LINEARS, ModelConfig

PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
}
"""FLOP/s of dense bfloat16 products by JAX's `device_kind`: NVIDIA's data sheets, whose figures with sparsity are halved."""


def linear_parameters(model: ModelConfig) -> int:
    """N, with the head, also if it is the embedding."""
    layer = sum(out * into for out, into in map(model.linear_shape, LINEARS))
    return model.num_layers * layer + model.vocab_size * model.embed_dim


def mfu_per_token(model: ModelConfig, devices: Sequence[Any], *, dtype: str, trains_backbone: bool) -> float | None:
    """MFU of one token per second; None for other types than bfloat16, and on devices whose peak is not known."""
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if dtype != "bfloat16" or len(known) < len(peaks):
        return None
    return (6 if trains_backbone else 4) * linear_parameters(model) / sum(known)
