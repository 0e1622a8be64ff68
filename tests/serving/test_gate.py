"""The gate before the application, without a server: bodies that do not come, clients that go, pieces of a body."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

import pytest

from adafuse_jax.serving import security
from adafuse_jax.serving.errors import APIError
from adafuse_jax.serving.security import MAX_BODY_BYTES, Gate


def ask(
    messages: list[dict[str, Any]], headers: dict[str, str] | None = None, *, only_loopback: bool = False
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """(messages sent, bodies that the application got) of a request whose parts are `messages`; then nothing more comes."""
    left, sent, bodies = iter(messages), list[dict[str, Any]](), list[bytes]()

    async def receive() -> dict[str, Any]:
        if (message := next(left, None)) is None:
            await asyncio.sleep(60)
        return message  # type: ignore[return-value]

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    scope = {
        "type": "http",
        "path": "/v1/models",
        "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
    }
    asyncio.run(Gate(app, key=None, only_loopback=only_loopback)(scope, receive, send))  # type: ignore[arg-type]
    return sent, bodies


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.parametrize("given", ["", "k", "a" * 1000, "a-key-of-the-test", "b-key-of-the-tests"])
def test_keys_are_compared_in_constant_time(given: str, monkeypatch: pytest.MonkeyPatch):
    """By the function for that, of two texts of one length, whatever the client's key has in common with the right one."""
    compared = []

    def compare_digest(one: bytes, two: bytes) -> bool:
        compared.append((one, two))
        return one == two

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    gate = Gate(None, key="a-key-of-the-tests", only_loopback=False)  # type: ignore[arg-type]
    scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", f"Bearer {given}".encode())]}
    with pytest.raises(APIError, match="wrong or missing"):
        gate._check(scope)
    ((one, two),) = compared
    assert len(one) == len(two)
    assert one != two


def test_a_body_in_parts():
    sent, bodies = ask([part(b"ab", True), part(b"", True), part(b"c", False)])
    assert bodies == [b"abc"]
    assert (b"x-content-type-options", b"nosniff") in sent[0]["headers"]


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.05)
    sent, bodies = ask([part(b"ab", True)])
    assert (sent[0]["status"], bodies) == (408, [])
    assert json.loads(sent[1]["body"])["error"]["type"] == "invalid_request_error"


def test_a_client_that_goes_before_its_body_is_there():
    assert ask([part(b"ab", True), {"type": "http.disconnect"}]) == ([], [])


@pytest.mark.parametrize("length", [str(MAX_BODY_BYTES + 1), "9" * 30, "-1", "1_0", "\u0663"])
def test_sizes_that_are_refused_unread(length: str):
    """Before a byte of the body is read: nothing comes, and the answer is there."""
    sent, bodies = ask([], {"content-length": length})
    assert (sent[0]["status"], bodies) == (413, [])


@pytest.mark.parametrize("host", ["localhost:80", "LOCALHOST", "127.0.0.1:80", "127.0.0.2", "[::1]:80"])
def test_names_of_this_machine(host: str):
    assert ask([part(b"", False)], {"host": host}, only_loopback=True)[0][0]["status"] == 200


@pytest.mark.parametrize("host", ["", "evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "[", "::1"])
def test_other_names(host: str):
    assert ask([part(b"", False)], {"host": host}, only_loopback=True)[0][0]["status"] == 403
