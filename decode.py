#!/usr/bin/env python3
"""Decode with a Hugging Face model and, if given, an adapter: `python decode.py --model DIR --adapter DIR --prompt TEXT`."""

from __future__ import annotations

from collections.abc import Sequence

from adafuse_jax.configs import DecodeConfig
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import run_cli
from adafuse_jax.core.flags import parse_flags


def main(argv: Sequence[str]) -> int:
    (config,) = parse_flags(__doc__, (DecodeConfig,), argv)
    runtime.set_up()
    from adafuse_jax.decoding.session import decode

    with runtime.memory_errors_told("shorten the prompt, lower --max-new-tokens or give --dtype bfloat16"):
        decode(config)
    return 0


if __name__ == "__main__":
    run_cli(main)
