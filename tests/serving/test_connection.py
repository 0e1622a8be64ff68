"""Heads of requests that are too large, or too slow, over a real connection, without a model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from adafuse_jax.serving import connection
from adafuse_jax.serving.connection import MAX_HEAD_BYTES, Connection

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
LINES = b"a: b\r\n" * 2000
LARGE = b"x" * MAX_HEAD_BYTES


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(0.3 if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def reply_to(*parts: bytes, pause: float = 0.0) -> bytes:
    """Bytes that the connection brings until the server closes it; the client does not."""
    settings: dict[str, Any] = {"http": Connection, "log_config": None, "lifespan": "off"}
    config = uvicorn.Config(app, **settings)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause)
            return await reader.read()
        except ConnectionError:  # it was closed while more came
            return b""
        finally:
            writer.close()


@pytest.mark.parametrize(
    "parts",
    [
        [GET, *[LINES] * 20],
        [GET, b"a: ", LARGE],
        [b"GET /", LARGE],
        [POST, b"0\r\n", *[LINES] * 20],
        [POST, b"1;", LARGE],
    ],
    ids=["headers", "a header", "an address", "trailers", "a piece's extension"],
)
def test_no_end_of_a_head(parts: list[bytes]):
    """The parser would keep all of it, and wait."""
    reply = asyncio.run(reply_to(*parts, b"more"))
    assert reply in (b"",) or reply.startswith(b"HTTP/1.1 400")


def test_a_large_body_is_no_head(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    size = 4 * MAX_HEAD_BYTES
    whole = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    pieces = POST + b"1000\r\n" + b"x" * 4096 + b"\r\n0\r\n\r\n"
    reply = asyncio.run(reply_to(whole, pieces * 50, b"GET"))
    assert reply.count(b"HTTP/1.1 200") == 51


@pytest.mark.parametrize("parts", [[], [b"GET / HT"], [GET], [GET + b"\r\n", GET]])
def test_a_head_that_takes_long(parts: list[bytes], monkeypatch: pytest.MonkeyPatch):
    """The connection is closed; a request before that is answered."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    reply = asyncio.run(reply_to(*parts, pause=0.02))
    assert reply.count(b"HTTP/1.1 200") == (len(parts) == 2)


def test_a_reply_that_takes_longer_than_a_head_may(monkeypatch: pytest.MonkeyPatch):
    """Also where another request has begun to come meanwhile."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    reply = asyncio.run(reply_to(b"GET /slow HTTP/1.1\r\n\r\n", GET, pause=0.02))
    assert reply.count(b"HTTP/1.1 200") == 1
