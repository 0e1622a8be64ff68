"""Low-rank experts of a prompt's tokens, forward only: products of the chosen experts, added to the outputs of linears."""

from pallas_kernels.prompt_experts.kernel_triton import expand, expand_gated, expand_into, shrink, unsupported_reason
from pallas_kernels.prompt_experts.pairs import TOKEN_TILE, Pairs, pair_tokens

__all__ = [
    "TOKEN_TILE",
    "Pairs",
    "expand",
    "expand_gated",
    "expand_into",
    "pair_tokens",
    "shrink",
    "unsupported_reason",
]
