#!/usr/bin/env python3
"""Decode with a Hugging Face model and, if given, an adapter: `python decode.py --model DIR --adapter DIR --prompt TEXT`."""

from __future__ import annotations

from collections.abc import Sequence

from adafuse_jax.core.cli import run_cli


def main(argv: Sequence[str]) -> int:
    from adafuse_jax.core import runtime
    from adafuse_jax.core.flags import parse_flags
    from adafuse_jax.inference.config import DecodeConfig

    (config,) = parse_flags(__doc__, (DecodeConfig,), argv)
    runtime.set_up()
    with runtime.memory_errors("shorten the prompt, lower --batch-size or --max-new-tokens, or give --dtype bfloat16"):
        from adafuse_jax.inference.session import decode

        decode(config)
    return 0


if __name__ == "__main__":
    run_cli(main)
