"""Low-rank experts of a prompt's tokens, forward only: products of the chosen experts, added to the outputs of linears."""

from pallas_kernels.prompt_experts.kernel_triton import expand_gated, expand_into, shrink, unsupported_reason
from pallas_kernels.prompt_experts.pairs import Pairs, pair_tokens

__all__ = ["Pairs", "expand_gated", "expand_into", "pair_tokens", "shrink", "unsupported_reason"]
