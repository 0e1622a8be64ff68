"""Encoding of a data set in a stream, by several processes: chunks of examples in, chunks of rows out, in their order.

The first chunks are encoded in this process: a small data set is done before others could have started. Each process holds
one chunk, and as many wait for each, so memory does not depend on the number of examples.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.data.chat import Chunk, Encoding, chunks, encode_chunk, log_left_out
from adafuse_jax.data.examples import Example
from adafuse_jax.data.left_out import LeftOut
from adafuse_jax.data.templates import template_date

OWN_CHUNKS = 8
"""Chunks that this process encodes before it starts others."""
MAX_PROCESSES = 16
"""More would wait for this process, which reads the rows."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time in a period, or "max", and the period."""
BAR_DELAY = 3
"""Seconds until a progress bar is shown."""
LAST_LINE_BYTES = 4096
"""Bytes at the end of a process's stderr in which its last line is looked for."""
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from adafuse_jax.data.encode_worker import main; main()"
)
"""Program of a process: with the import path of this one, whose main module it does not run."""


def encode_stream(
    examples: Iterable[Example], tokenizer: Any, max_length: int, encoding: Encoding, *, total: int
) -> Generator[Chunk]:
    """The chunks of rows of `total` examples, as `encode_all` has them, counted and logged by `encoding`. Shows a progress
    bar where stderr is a terminal. Raises UserError as `encode_all`."""
    left_out = LeftOut(tokenizer)
    bar = tqdm(total=total, unit=" examples", desc="tokenising", disable=None, delay=BAR_DELAY, dynamic_ncols=True)
    with template_date() as date, _Encoders(tokenizer, max_length, date) as encoders, bar:

        def seen() -> Iterator[list[Example]]:
            for chunk in chunks(examples):
                log_left_out(left_out, chunk, encoding)
                yield chunk

        for chunk in encoders.encoded(seen()):
            encoding.add(chunk)
            bar.update(chunk.counts["examples"])
            yield chunk
    encoding.finish()


def _processors() -> int:
    """Processors that this process may use: by its affinity, and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control groups of version 2; "max"
        quota, period = map(int, CPU_QUOTA.read_text().split())
        return max(1, min(count, quota // period))
    return count


class _Encoders:
    """Processes that encode, one for each processor of this one."""

    def __init__(self, tokenizer: Any, max_length: int, date: datetime):
        self._setting = (tokenizer, max_length, date)
        self._count = min(MAX_PROCESSES, _processors())
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors: dict[int, IO[bytes]] = {}
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def __enter__(self) -> _Encoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            process.wait()
            self._errors[process.pid].close()

    def encoded(self, given: Iterable[Sequence[Example]]) -> Iterator[Chunk]:
        waiting: deque[Future[Chunk]] = deque()
        for number, examples in enumerate(given):
            if self._count == 1 or number < OWN_CHUNKS:
                tokenizer, max_length, _ = self._setting
                yield encode_chunk(examples, tokenizer, max_length)
                continue
            waiting.append(self._submit(examples))
            if len(waiting) > 2 * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _submit(self, examples: Sequence[Example]) -> Future[Chunk]:
        if self._threads is None:
            setting = pickle.dumps(self._setting, pickle.HIGHEST_PROTOCOL)
            self._threads = ThreadPoolExecutor(self._count)
            for _ in range(self._count):
                self._threads.submit(self._set_up, self._start(), setting)
        return self._threads.submit(self._ask, examples)

    def _start(self) -> subprocess.Popen[bytes]:
        silent = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            errors = tempfile.TemporaryFile(prefix="adafuse-data-")  # noqa: SIM115  closed by __exit__
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, json.dumps(sys.path)], env=os.environ | silent,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,  # Ctrl-C is for this process
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"a process that tokenises the data cannot be started: {error.strerror or error}: free what is short, or "
                "limit the processors of this one, as by taskset -c 0"
            ) from error
        self._processes.append(process)
        self._errors[process.pid] = errors
        return process

    def _set_up(self, process: subprocess.Popen[bytes], setting: bytes) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # raised again when it is asked
            process.stdin.write(setting)
        self._idle.put(process)

    def _ask(self, examples: Sequence[Example]) -> Chunk:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(examples, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):  # it has ended, perhaps amid its answer
            raise self._ended(process.wait(), self._errors[process.pid]) from None
        finally:
            self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self, code: int, errors: IO[bytes]) -> UserError:
        """The end of a process, by the last line that it wrote, or by a kill, as where memory is short."""
        reason = f"is there enough memory for {self._count} of them?"
        if code != -signal.SIGKILL:
            start = max(0, os.fstat(errors.fileno()).st_size - LAST_LINE_BYTES)
            lines = os.pread(errors.fileno(), LAST_LINE_BYTES, start).decode(errors="replace").split("\n")
            reason = shortened(next(filter(str.strip, reversed(lines)), "it wrote no error"), 160)
        return UserError(
            f"a process that tokenises the data ended (exit code {code}): {reason}: limit the processors of this one, as "
            "by taskset -c 0"
        )
