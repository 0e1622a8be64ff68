"""Linears with token-level pre-gated low-rank experts, unmerged: y = W x + Σ_u g_u B[e_u] (A[e_u] x) in one kernel
launch."""

from pallas_kernels.megakernel.mixture import Mixture, make_mixture
from pallas_kernels.pregated_linear.kernel_triton import ACTIVATIONS, Group, Tiles
from pallas_kernels.pregated_linear.op import pregated_linear, tiles_for, unsupported_reason
from pallas_kernels.pregated_linear.reference import pregated_linear_xla

__all__ = [
    "ACTIVATIONS", "Group", "Mixture", "Tiles", "make_mixture", "pregated_linear", "pregated_linear_xla", "tiles_for",
    "unsupported_reason",
]  # fmt: skip
