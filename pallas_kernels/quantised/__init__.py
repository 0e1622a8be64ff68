"""Weights as codes of 8 or 4 bits and scales: y = x (s · (c − 2^(bits−1)))ᵀ."""

from pallas_kernels.quantised.quant_array import (
    INT4,
    INT4_G64,
    INT8,
    QuantArray,
    QuantLayout,
    quantise,
    quantised_product,
)

__all__ = ["INT4", "INT4_G64", "INT8", "QuantArray", "QuantLayout", "quantise", "quantised_product"]
