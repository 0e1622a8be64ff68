"""Train a backbone and AdaFuse adapters from nothing, and show what the adapters change: `python -m examples.skills`."""

from __future__ import annotations

from collections.abc import Sequence

from adafuse_jax.core.cli import run_cli


def main(argv: Sequence[str]) -> int:
    import sys

    from adafuse_jax.core import runtime
    from adafuse_jax.core.flags import parse_flags
    from examples.skills.config import DemoConfig

    (config,) = parse_flags(__doc__, (DemoConfig,), argv)
    runtime.set_up()
    with runtime.memory_errors("free some memory"):
        from adafuse_jax.training.signals import Stopped
        from examples.skills.story import run_demo

        try:
            return run_demo(config)
        except Stopped as stopped:
            message, signal_number = stopped.args
            print(message, file=sys.stderr)
            return 128 + signal_number


if __name__ == "__main__":
    run_cli(main)
