"""Decoding: ms per token of AdaFuse, its backbone and its peers, and the parts of a step."""
