"""Data sets to packed batches."""
