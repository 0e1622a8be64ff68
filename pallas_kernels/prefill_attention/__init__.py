"""Causal attention of many tokens of a prompt to the KV cache, without a mask."""

from pallas_kernels.prefill_attention.kernel_triton import Tiles, prefill_attention, tiles_for, unsupported_reason
from pallas_kernels.prefill_attention.reference import prefill_attention_xla

__all__ = ["Tiles", "prefill_attention", "prefill_attention_xla", "tiles_for", "unsupported_reason"]
