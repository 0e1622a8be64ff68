"""Train a backbone and AdaFuse adapters from nothing, and show what the adapters change: `python -m adafuse_jax.demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from adafuse_jax.core import runtime
from adafuse_jax.core.errors import run_cli
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.demo.config import DemoConfig

SIGTERM_EXIT_CODE = 143


def main(argv: Sequence[str]) -> int:
    (config,) = parse_flags(__doc__, (DemoConfig,), argv)
    runtime.set_up()
    from adafuse_jax.demo.story import run_demo
    from adafuse_jax.training.loop import Stopped

    try:
        return run_demo(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return SIGTERM_EXIT_CODE


if __name__ == "__main__":
    run_cli(main)
