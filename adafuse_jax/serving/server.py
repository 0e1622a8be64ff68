"""The server process: socket, event loop, and its end by signals.

SIGTERM or Ctrl-C: new requests get 503, those that run have `--drain-seconds`, then the process ends with exit code 0. The
second signal ends it without waiting. A scheduler that gives up ends it with exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from adafuse_jax.core.errors import UserError
from adafuse_jax.serving.app import make_app
from adafuse_jax.serving.config import ServeConfig
from adafuse_jax.serving.connection import Connection
from adafuse_jax.serving.models import AdapterReader, Models, load_models
from adafuse_jax.serving.security import api_key, is_loopback
from adafuse_jax.serving.service import Service

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
KEEP_ALIVE_SECONDS = 75
"""Time that an idle connection stays open: longer than clients and proxies keep one, so that none sends on one that is about
to close."""
END_SECONDS = 10
"""Time that the scheduler gets to end: a compilation may run."""
SWITCH_SECONDS = 0.0005
"""Time after which the event loop lets the scheduler's thread go on: Python's own 5 ms are as long as a step."""
CLOSE_SECONDS = 5
"""Time that connections get to send the rest of their replies, after the rows have ended."""


def serve(config: ServeConfig) -> int:
    """Serve until a signal ends it; the exit code. The port is bound before the model is read."""
    key = api_key(config)
    with bound_socket(config.host, config.port) as listener:
        models, reader = load_models(config, now=int(time.time()))
        server = Server(config, models, reader, listener, key)
        listen(listener, config)
        server.run(sockets=[listener])
    return server.exit_code


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket on host and port, which another server may just have left. Raises `UserError`."""
    listener = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        yield listener
    except (OSError, UnicodeError) as error:
        if listener is not None and listener.fileno() >= 0 and listener.getsockname()[1]:
            raise  # bound: an error of what was done with it
        raise cannot_listen(host, port, error) from error
    finally:
        if listener is not None:
            listener.close()


def listen(listener: socket.socket, config: ServeConfig) -> None:
    """Let clients connect. Raises `UserError` where another server, which bound the port too, listens already."""
    try:
        listener.listen()
    except OSError as error:
        raise cannot_listen(config.host, config.port, error) from error


def cannot_listen(host: str, port: int, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"--host {host} --port {port}: cannot be listened on ({reason}); give another one")


class Server(uvicorn.Server):
    """uvicorn, which here leaves signals to this class: it would close the port and wait for ever."""

    def __init__(
        self,
        config: ServeConfig,
        models: Models,
        reader: AdapterReader | None,
        listener: socket.socket,
        key: str | None,
    ):
        self._drain_seconds, self.exit_code = config.drain_seconds, 0
        self._service = Service(config, models, reader, self._on_scheduler_end)
        self._address = listener.getsockname()
        only_loopback = is_loopback(config.host) and key is None
        if not is_loopback(config.host) and key is None:
            log.warning("--host %s without --api-key-file: everyone who reaches this address can use it", config.host)
        app = make_app(self._service, key=key, only_loopback=only_loopback)
        settings: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
        settings |= {"timeout_graceful_shutdown": CLOSE_SECONDS, "timeout_keep_alive": KEEP_ALIVE_SECONDS}
        settings |= {"http": Connection}
        super().__init__(uvicorn.Config(app, **settings))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.collect()
        gc.freeze()  # a full collection would stop all rows while it looks through what lives as long as the server
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        host, port = self._address[:2]
        log.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def _on_signal(self) -> None:
        if self._service.is_draining:
            self._drain_seconds = 0
            return
        self._service.is_draining = True
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        service, begun = self._service, time.monotonic()
        log.info("stopping: %d requests run, and have %d s", service.open_requests, self._drain_seconds)
        while service.open_requests and time.monotonic() - begun < self._drain_seconds:
            await asyncio.sleep(POLL_SECONDS)
        if service.open_requests:
            log.warning("%d requests are cut off", service.open_requests)
        service.scheduler.stop()
        await asyncio.sleep(END_SECONDS)
        log.warning("a step does not end, and is left")
        self.should_exit = True

    def _on_scheduler_end(self, gave_up: bool) -> None:
        if gave_up:
            log.error("decoding is impossible, and the server ends")
            self._service.is_draining, self.exit_code = True, 1
        self.should_exit = True
