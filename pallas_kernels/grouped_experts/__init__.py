"""Products of the chosen low-rank experts only, for many tokens: forward and all gradients."""

from pallas_kernels.grouped_experts.groups import TILE, Groups, gates_of_items, group_tokens
from pallas_kernels.grouped_experts.op import grouped_product, saves, unsupported_reason

__all__ = ["TILE", "Groups", "gates_of_items", "group_tokens", "grouped_product", "saves", "unsupported_reason"]
