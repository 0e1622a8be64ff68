"""Process-wide settings of the two scripts: quiet libraries, our own log lines, the persistent compilation cache."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError


def set_up() -> None:
    """Call before JAX or transformers is used. Respects JAX_COMPILATION_CACHE_DIR if it is set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.ERROR)
    logging.getLogger("adafuse_jax").setLevel(logging.INFO)
    _tell_kernels_once()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale may lack the characters of an answer
    _silence_background_errors()
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "adafuse-jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))


@cache
def _tell_kernels_once() -> None:
    """Which kernel runs, and why not a faster one, is logged at every compilation; say each of it once."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in told
        told.add(text)
        return new

    logging.getLogger("pallas_kernels").setLevel(logging.INFO)
    logging.getLogger("pallas_kernels.sgmm.op").addFilter(is_new)


def _silence_background_errors() -> None:
    """The threads that write a checkpoint print tracebacks of errors that `Checkpoints` tells in one line."""
    import absl.logging  # its import sets the level changed here

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


@contextmanager
def memory_errors_told(advice: str) -> Iterator[None]:
    """Within, a device that runs out of memory is a `UserError` that ends with `advice`."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"the device has too little memory ({reason}); {advice}") from error


def exact_float32() -> None:
    """Multiply float32 matrices in float32: by default GPUs round their operands to 10-bit mantissas (TF32).

    For float32 models only: the setting also slows bfloat16 products down.
    """
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")


def peak_device_gib() -> float | None:
    """The most memory this process has had in use on its first device, in GiB; None where the device does not tell."""
    import jax

    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else round(peak / 2**30, 3)
