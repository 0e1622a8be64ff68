"""Weights in and out: Hugging Face models and adapter directories."""
