"""One token's attention to its cache in one kernel launch, with rotary embedding and the cache's update."""

from pallas_kernels.decode_attention.kernel_triton import decode_attention, unsupported_reason
from pallas_kernels.decode_attention.reference import decode_attention_xla

__all__ = ["decode_attention", "decode_attention_xla", "unsupported_reason"]
