"""Commands of the package: `adafuse train | decode | evaluate | export | serve`, the same as `python -m adafuse_jax …`.

train.py and decode.py run the first two from a clone; `adafuse_jax.evaluation`, `adafuse_jax.export` and
`adafuse_jax.serving` hold the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from adafuse_jax.core.cli import run_cli


def train(argv: Sequence[str], program: str = "train.py") -> int:
    """Fine-tune adapters of a Hugging Face model."""
    import json
    import sys

    from adafuse_jax.adapters.config import AdapterConfig
    from adafuse_jax.core import runtime
    from adafuse_jax.core.flags import parse_flags
    from adafuse_jax.training.config import TrainConfig

    config, adapter_config = parse_flags(train.__doc__, (TrainConfig, AdapterConfig), argv, program)
    runtime.set_up()
    from adafuse_jax.parallel import processes

    processes.start(config.coordinator, config.num_processes, config.process_id)
    memory_errors = runtime.memory_errors(
        "give --remat full, or lower --batch-size, --max-length, --rank or --num-experts; --mesh fsdp=-1 uses all devices"
    )
    with processes.several_processes(), memory_errors:
        from adafuse_jax.training.signals import Stopped
        from adafuse_jax.training.trainer import train as run_training

        try:
            summary = run_training(config, adapter_config)
        except Stopped as stopped:
            message, signal_number = stopped.args
            if processes.is_first():
                print(message, file=sys.stderr)
            return 128 + signal_number
    if processes.is_first():
        print(json.dumps(summary, indent=2))
    return 0


def decode(argv: Sequence[str], program: str = "decode.py") -> int:
    """Decode with a Hugging Face model and, if given, an adapter."""
    from adafuse_jax.core import runtime
    from adafuse_jax.core.flags import parse_flags
    from adafuse_jax.inference.config import DecodeConfig

    (config,) = parse_flags(decode.__doc__, (DecodeConfig,), argv, program)
    runtime.set_up()
    runtime.start_devices()
    with runtime.memory_errors("shorten the prompt, lower --batch-size or --max-new-tokens, or give --dtype bfloat16"):
        from adafuse_jax.inference.console import decode as run_decoding

        run_decoding(config)
    return 0


def evaluate(argv: Sequence[str], program: str) -> int:
    """Measure accuracy on multiple-choice data sets."""
    from adafuse_jax.evaluation.__main__ import main

    return main(argv, program)


def export(argv: Sequence[str], program: str) -> None:
    """Export an adapter for other programs."""
    from adafuse_jax.export import main

    main(argv, program)


def serve(argv: Sequence[str], program: str) -> int:
    """Serve a model and its adapters over HTTP, as OpenAI's API."""
    from adafuse_jax.serving.__main__ import main

    return main(argv, program)


COMMANDS: dict[str, Callable[[Sequence[str], str], int | None]] = {
    "train": train, "decode": decode, "evaluate": evaluate, "export": export, "serve": serve,
}  # fmt: skip


def main(argv: Sequence[str]) -> int | None:
    """Give `argv[1:]` to the command `argv[0]`. Raises `UserError` if it is missing or unknown."""
    from adafuse_jax.core.errors import UserError, quoted

    name = argv[0] if argv else None
    if name in COMMANDS:
        return COMMANDS[name](argv[1:], f"adafuse {name}")
    if name not in ("-h", "--help"):
        fault = "a command is missing" if name is None else f"unknown command {quoted(name)}"
        raise UserError(f"{fault}; give one of {', '.join(COMMANDS)}; see --help")
    print("usage: adafuse COMMAND [--help] [flags]\n")
    for name, command in COMMANDS.items():
        print(f"  {name:<10}{command.__doc__}")
    return 0


def run() -> NoReturn:
    """Entry point of the installed program `adafuse`."""
    run_cli(main)


if __name__ == "__main__":
    run()
