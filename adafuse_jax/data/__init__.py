"""Data sets to batches: sources → examples → tokens with loss masks → packed rows → batches by step."""
