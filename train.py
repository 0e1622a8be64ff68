#!/usr/bin/env python3
"""Fine-tune adapters of a Hugging Face model: `python train.py --model DIR --dataset FILE --output RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from adafuse_jax.core.cli import run_cli


def main(argv: Sequence[str]) -> int:
    import json
    import sys

    from adafuse_jax.adapters.config import AdapterConfig
    from adafuse_jax.core import runtime
    from adafuse_jax.core.flags import parse_flags
    from adafuse_jax.training.config import TrainConfig

    config, adapter_config = parse_flags(__doc__, (TrainConfig, AdapterConfig), argv)
    runtime.set_up()
    with runtime.memory_errors("lower --batch-size, --max-length, --rank or --num-experts"):
        from adafuse_jax.training.signals import Stopped
        from adafuse_jax.training.trainer import train

        try:
            summary = train(config, adapter_config)
        except Stopped as stopped:
            message, signal_number = stopped.args
            print(message, file=sys.stderr)
            return 128 + signal_number
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    run_cli(main)
