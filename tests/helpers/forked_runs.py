"""Training runs as processes that begin with all libraries imported, which is two thirds of a start: they are forked from
a server that has imported them and has not yet used JAX."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from adafuse_jax.__main__ import train
from adafuse_jax.core.cli import run_cli

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["forked_runs", "adafuse_jax.training.trainer", "matplotlib.pyplot", "transformers.models.auto.tokenization_auto"]
)


class ForkedRun:
    """`python train.py FLAGS`, compiled as for a user, in a process group of its own. `compiled` holds its programs."""

    def __init__(self, flags: Sequence[str], compiled: Path, stderr: Path):
        self._stderr = stderr
        self._process = FORKS.Process(target=_train, args=(flags, str(compiled), str(stderr)))
        self._process.start()
        while self.running and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def finish(self) -> tuple[int, str]:
        """(exit code, or minus the signal that ended it; stderr)."""
        self._process.join(timeout=300)
        assert self._process.exitcode is not None, "still running"
        return self._process.exitcode, self._stderr.read_text()


def _train(flags: Sequence[str], compiled: str, stderr: str) -> None:
    os.setsid()
    null, log = os.open(os.devnull, os.O_RDWR), os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for number, stream in enumerate((null, null, log)):
        os.dup2(stream, number)
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    run_cli(train, flags)
