#!/usr/bin/env python3
"""Fine-tune adapters of a Hugging Face model: `python train.py --model DIR --dataset FILE --output RUN`."""

from adafuse_jax.__main__ import train as main
from adafuse_jax.core.cli import run_cli

if __name__ == "__main__":
    run_cli(main)
