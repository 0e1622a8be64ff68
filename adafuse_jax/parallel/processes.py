"""Several processes that train together: their start, what the first one decides for all, and the meeting of all.

Every process runs the same program on its own devices and rows; `jax.distributed` joins them. A process that dies is missed
after `HEARTBEAT_SECONDS`, and ends the others.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adafuse_jax.core.cli import message_of
from adafuse_jax.core.errors import EXIT_CODE, UserError, shortened
from adafuse_jax.core.runtime import native_stdout_on_stderr

START_SECONDS, HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 300, 30, 20


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes: those of a coordinator, or those that SLURM, Open MPI or Kubernetes has started beside this.
    Call before JAX finds its devices. Without others nothing happens. All but the first process log errors only.

    Raises:
      UserError: the others cannot be reached.
    """
    if coordinator is None and not is_one_of_several():
        return
    if coordinator is not None:
        _require_coordinator(coordinator, is_here=process_id == 0)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which `stop_signals` handles
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        where = f"--coordinator {coordinator}" if coordinator else "the other processes of this job"
        raise UserError(
            f"{where}: cannot be joined ({shortened(str(error), 200)}); start all processes with one address that each of "
            "them can reach"
        ) from error
    if jax.process_index() > 0:
        logging.getLogger("adafuse_jax").setLevel(logging.ERROR)
        logging.getLogger("pallas_kernels").setLevel(logging.ERROR)


def _require_coordinator(address: str, *, is_here: bool) -> None:
    """Raise `UserError` unless process 0 can listen at the address, and the others reach it before `START_SECONDS` have
    passed: JAX would end the interpreter."""
    host, _, port = address.rpartition(":")
    begun = time.monotonic()
    while True:
        try:
            if is_here:
                socket.create_server(("", int(port))).close()
            else:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if is_here or isinstance(error, OverflowError):
                raise UserError(
                    f"--coordinator {address}: the port cannot be opened ({reason}); give another"
                ) from error
            if time.monotonic() - begun > START_SECONDS:
                raise UserError(
                    f"--coordinator {address}: cannot be reached ({reason}); start process 0 there, or correct the address"
                ) from error
        time.sleep(0.5)


def is_one_of_several() -> bool:
    """Return whether a launcher has started this process as one of several. A SLURM batch script is one process, and so is a
    pod that is not of an indexed job."""
    variables = os.environ
    in_step = "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1
    in_job = "KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables
    return in_step or in_job or int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1


def is_first() -> bool:
    """Return whether this process is the one that writes logs and files."""
    return jax.process_index() == 0


def on_first[Result](function: Callable[[], Result]) -> Result:
    """The result of `function` in the first process, for all. It is of JSON's types; all processes call this together.

    Raises:
      UserError: what the first process raised, in all processes.
    """
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if is_first():
        try:
            answer = {"result": function()}
        except Exception as error:
            failure, answer = error, {"error": str(error)}
    data = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = np.frombuffer(data.ljust(size)[:size], np.uint8)
    answer = json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())
    if failure is not None:
        raise failure
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["result"]


def wait_for_all() -> None:
    """Return once all processes have called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all")


@contextlib.contextmanager
def several_processes() -> Iterator[None]:
    """Context of a command that may run in several processes.

    What compiled libraries print on stdout, as gloo does, goes to stderr. A computation that lacks another process raises a
    `UserError`. After an exception the interpreter ends at once, without the meeting of all that JAX has at its end.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        with native_stdout_on_stderr(), _lost_process_errors():
            yield
    except BaseException as error:
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else EXIT_CODE if message_of(error) else 1
        atexit.register(_exit, code)  # the last one registered is the first to run
        raise


@contextlib.contextmanager
def _lost_process_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TimeoutError) as error:  # JAX's own are RuntimeErrors, as are those of orbax's meetings
        raise UserError(
            f"a computation of several processes failed, as it does when one has ended or cannot be reached "
            f"({shortened(str(error), 160)}); when all can run again, continue with --resume"
        ) from error


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Agreement:
    """The largest of the numbers that the processes hold, agreed on by all without waiting for each other: a step later."""

    def __init__(self) -> None:
        self._mesh = Mesh(np.array(jax.devices()), ("devices",))
        self._before: jax.Array | None = None
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def __call__(self, number: Callable[[], int]) -> Callable[[], int]:
        """A function that returns the largest `number()` of all processes at the time of the call before this one, which all
        make together; of one process, that at the time when it is asked."""
        if jax.process_count() == 1:
            return number
        mine = np.array([number()], np.int32)
        sharding = NamedSharding(self._mesh, PartitionSpec("devices"))
        numbers = jax.make_array_from_callback((self._mesh.size,), sharding, lambda _: mine)
        before, self._before = self._before, self._largest(numbers)
        return lambda: 0 if before is None else int(before)
