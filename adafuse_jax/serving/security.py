"""The gate before every request: key, host, size and time of the body; and where adapters may be loaded from."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import read_text
from adafuse_jax.serving.config import ServeConfig
from adafuse_jax.serving.errors import APIError, invalid

MAX_BODY_BYTES = 8 * 2**20
BODY_SECONDS = 30.0
MAX_KEY_BYTES = 4096
OPEN_PATHS = ("/", "/health")
"""Paths without a key: a page without data, and what load balancers ask."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def api_key(config: ServeConfig) -> str | None:
    """The key of `--api-key` or the first line of `--api-key-file`. Raises `UserError` for an empty one."""
    key, place = config.api_key, "--api-key"
    if config.api_key_file is not None:
        place = f"--api-key-file {config.api_key_file}"
        text = read_text(
            Path(config.api_key_file), what="--api-key-file ", max_bytes=MAX_KEY_BYTES, advice="give an existing file"
        )
        key = (text.splitlines() or [""])[0].strip()
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise UserError(f"{place}: the key must be printable ASCII text and not empty; give another one")
    return key


def confined(path: str, folders: tuple[str, ...]) -> Path:
    """The real directory of an adapter below one of `folders`, symbolic links followed. Raises `APIError`: 403 outside them,
    whether it exists or not; 400 for none."""
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    for root in roots:
        real = Path(os.path.realpath(root / path))  # an absolute path replaces the root
        if real != root and real.is_relative_to(root):
            if not os.path.isdir(real):  # False for names that are too long, too
                raise invalid(f"lora_path {quoted(path)}: is no directory below --adapter-folders", "lora_path")
            return real
    raise APIError(403, f"lora_path {quoted(path)}: is not below --adapter-folders", param="lora_path")


def is_loopback(host: str) -> bool:
    """True for this machine, by name or address, which no other reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware: refuses a request before anything of it is read, then reads its body within bounds."""

    def __init__(self, app: ASGIApp, *, key: str | None, only_loopback: bool):
        """`only_loopback`: the server listens on this machine alone and has no key. Then names of other hosts are refused: a
        web page could let its own name point here (DNS rebinding)."""
        self._app, self._only_loopback = app, only_loopback
        self._key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            body = await _read_body(Headers(scope=scope), receive)
        except APIError as error:
            await error.response()(scope, receive, send_with_headers)
        except ConnectionError:
            pass  # the client has gone, or sends what is no HTTP
        else:
            await self._app(scope, _replayed(body, receive), send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host.rpartition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
        if self._only_loopback and not is_loopback(name.lower()):
            raise APIError(403, f"host {quoted(host)} is not this machine; start the server with --api-key-file")
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Both are digests of one length, compared in constant time.
        if not hmac.compare_digest(_digest(given.strip().encode()), self._key) or kind.lower() != "bearer":
            message = "the API key is wrong or missing; send it as Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _read_body(headers: Headers, receive: Receive) -> bytes:
    """The whole body. Raises `APIError` for one that is too large or too slow, ConnectionError if the client goes."""
    length = headers.get("content-length", "0")
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else MAX_BODY_BYTES + 1
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                if max(size, len(found)) > MAX_BODY_BYTES:
                    raise APIError(413, f"the body has more than {MAX_BODY_BYTES} bytes; shorten it")
                message = await receive()
                if message["type"] != "http.request":
                    raise ConnectionError
                found += message.get("body", b"")
                if not message.get("more_body", False):
                    return bytes(found)
    except TimeoutError:
        raise APIError(408, f"the body took more than {BODY_SECONDS:.0f} seconds; send it again") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body first, then what else comes: the end of the connection."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
