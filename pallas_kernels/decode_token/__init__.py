"""One decoding step of a whole decoder with pre-gated experts, in one launch."""

from pallas_kernels.decode_token.op import Experts, Shape, Weights, decode_token, obstacle

__all__ = ["Experts", "Shape", "Weights", "decode_token", "obstacle"]
