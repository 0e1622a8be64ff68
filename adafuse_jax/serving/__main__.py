"""The server's command: `python -m adafuse_jax.serving --model DIR --adapters NAME=DIR…`, or `adafuse serve`."""

from __future__ import annotations

from collections.abc import Sequence

from adafuse_jax.core import runtime
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.serving.config import ServeConfig

LIBRARIES = ("fastapi", "starlette", "pydantic", "uvicorn", "httptools", "prometheus_client")


def main(argv: Sequence[str], program: str = "python -m adafuse_jax.serving") -> int:
    """Serve a model and its adapters over HTTP, as OpenAI's API."""
    (config,) = parse_flags(main.__doc__, (ServeConfig,), argv, program)
    runtime.set_up()
    advice = "lower --max-slots, --max-model-len or --max-experts, or give --dtype bfloat16"
    with runtime.memory_errors(advice):
        try:
            from adafuse_jax.serving.server import serve
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in LIBRARIES:
                raise
            raise UserError(f"{error.name} is not installed; pip install 'adafuse-jax[serve]'") from error
        return serve(config)


if __name__ == "__main__":
    run_cli(main)
