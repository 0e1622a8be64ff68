#!/usr/bin/env python3
"""Decode with a Hugging Face model and, if given, an adapter: `python decode.py --model DIR --adapter DIR --prompt TEXT`."""

from adafuse_jax.__main__ import decode as main
from adafuse_jax.core.cli import run_cli

if __name__ == "__main__":
    run_cli(main)
