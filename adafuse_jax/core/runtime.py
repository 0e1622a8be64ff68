"""Process-wide settings of the commands: quiet libraries, our own log lines, the persistent compilation cache."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError, shortened

log = logging.getLogger(__name__)

MAX_LOG_LINE = 1000
"""Characters of a log line, at most."""
CACHE_WARNING = re.compile(r"Error (reading|writing) persistent compilation cache entry for '[^']*': (.*)", re.DOTALL)
_cache_faults: set[str] = set()
"""The faults of the cache that have been reported."""


def set_up() -> None:
    """Call before JAX or transformers is used. Respects JAX_COMPILATION_CACHE_DIR if it is set.

    Every log record and every warning of a library is one line on stderr.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = _StderrHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logging.getLogger("adafuse_jax").setLevel(logging.INFO)
    logging.raiseExceptions = False  # a stderr that is full or closed ends nothing
    warnings.showwarning = _show_warning
    _log_kernels_once()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a locale may lack the characters of an answer
    _silence_background_errors()
    import jax

    if not jax.config.jax_compilation_cache_dir:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        except RuntimeError:  # neither HOME nor an entry of the user
            log.warning("no home directory: compiled programs are not cached; set JAX_COMPILATION_CACHE_DIR")
        else:
            jax.config.update("jax_compilation_cache_dir", str(home / "adafuse-jax" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # dozens of small programs compile for seconds
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def started_devices() -> Iterator[None]:
    """Context whose devices a thread begins to initialise: a GPU's driver takes seconds, in which modules are imported.

    Raises:
      UserError: the body failed, and so did the devices. JAX names the reason to its first caller alone.
    """
    failed: list[Exception] = []

    def initialise() -> None:
        import jax

        try:
            jax.devices()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=initialise, name="devices")
    thread.start()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        thread.join()
        if not failed:
            raise
        reason = shortened(str(failed[0]) or str(error) or type(error).__name__, 200)
        platforms = shortened(os.environ.get("JAX_PLATFORMS", ""), 40)
        raise UserError(
            f"no device can be used ({reason}; JAX_PLATFORMS={platforms}); correct JAX_PLATFORMS, or repair the driver"
        ) from error


class _StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _OneLine(logging.Formatter):
    """The message alone, as one line without the traceback that a library may add."""

    def format(self, record: logging.LogRecord) -> str:
        return shortened(record.getMessage(), MAX_LOG_LINE)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    text = f"{message} ({category.__name__})"
    if found := CACHE_WARNING.match(str(message)):  # of each of dozens of programs
        if found[1] in _cache_faults:
            return
        _cache_faults.add(found[1])
        text = (
            f"{found[1]} the cache of compiled programs failed ({shortened(found[2], 200)}); empty its directory, or set "
            "JAX_COMPILATION_CACHE_DIR to one that can be written"
        )
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {shortened(text, MAX_LOG_LINE)}", file=sys.stderr)


@cache
def _log_kernels_once() -> None:
    """Filter repeated kernel messages: every compilation logs which kernel runs, and why a faster one cannot."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in seen
        seen.add(text)
        return new

    logging.getLogger("pallas_kernels").setLevel(logging.INFO)
    logging.getLogger("pallas_kernels.sgmm.op").addFilter(is_new)


def _silence_background_errors() -> None:
    """The threads that write a checkpoint print tracebacks of errors that `Checkpoints` reports in one line; a Ctrl-C in
    a destructor or callback has no traceback either."""
    import absl.logging  # its import sets the level changed here

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def hook(unraisable: Any) -> None:
        interrupted = isinstance(unraisable.exc_value, KeyboardInterrupt)
        if not interrupted and "Event loop is closed" not in str(unraisable.exc_value):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Context in which a device or host that runs out of memory raises a `UserError` that ends with `advice`."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = shortened(str(error).splitlines()[0], 200)
        raise UserError(f"the device has too little memory ({reason}); {advice}") from error
    except MemoryError as error:
        reason = shortened(str(error), 200) or "an allocation failed"
        raise UserError(f"the host has too little memory ({reason}); {advice}") from error


@contextlib.contextmanager
def native_stdout_on_stderr() -> Iterator[None]:
    """Redirect what compiled libraries print on stdout to stderr: stdout is for answers."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def exact_float32() -> None:
    """Multiply float32 matrices in float32: by default GPUs round their operands to 10-bit mantissas (TF32).

    For float32 models only: the setting also slows bfloat16 products down.
    """
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")


def peak_device_gib() -> float | None:
    """The most memory this process has had in use on its first device, in GiB; None where the device does not report it."""
    return _memory_gib("peak_bytes_in_use")


def device_limit_gib() -> float | None:
    """The most memory that this process may have in use on its first device, in GiB; None as above."""
    return _memory_gib("bytes_limit")


def _memory_gib(name: str) -> float | None:
    import jax

    found = (jax.local_devices()[0].memory_stats() or {}).get(name)
    return None if found is None else round(found / 2**30, 3)
