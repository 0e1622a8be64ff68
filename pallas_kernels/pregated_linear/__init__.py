"""Linears with token-level pre-gated low-rank experts, unmerged: y = W x + Σ_u g_u B[e_u] (A[e_u] x) in one kernel
launch."""

from pallas_kernels.megakernel.mixture import Mixture, make_mixture
from pallas_kernels.pregated_linear.op import IMPLEMENTATIONS, choose_implementation, pregated_linear

__all__ = ["IMPLEMENTATIONS", "Mixture", "choose_implementation", "make_mixture", "pregated_linear"]
