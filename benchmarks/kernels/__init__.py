"""Kernels by themselves: the merge, linears with pre-gated experts, streaming of weights."""
