"""Segmented gather matrix multiplication (SGMM): merge the selected LoRA experts of every layer in one kernel
launch."""

from pallas_kernels.sgmm.op import IMPLEMENTATIONS, choose_implementation, sgmm
from pallas_kernels.sgmm.terms import Terms, golden_terms, switch_terms

__all__ = ["IMPLEMENTATIONS", "Terms", "choose_implementation", "golden_terms", "sgmm", "switch_terms"]
