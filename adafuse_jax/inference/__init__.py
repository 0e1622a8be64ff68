"""Prefill, decode step, sampling and streaming generation."""
