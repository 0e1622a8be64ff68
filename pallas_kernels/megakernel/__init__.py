"""The megakernel: one decoding step of a whole decoder with pre-gated experts, in one kernel launch."""

from pallas_kernels.megakernel.op import Experts, Profile, Shape, Weights, decode_token, unsupported_reason

__all__ = ["Experts", "Profile", "Shape", "Weights", "decode_token", "unsupported_reason"]
