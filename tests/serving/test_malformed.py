"""Requests that are wrong: each gets a 4xx in OpenAI's form that names the fault, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from serving import BASE, KEY, ServerProcess

from adafuse_jax.serving.protocol import Body, ChatRequest, CompletionRequest

COMPLETION: dict[str, Any] = {"model": BASE, "prompt": "Once", "max_tokens": 1}
CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}

SHARED: list[dict[str, Any]] = [
    {"model": None}, {"model": ""}, {"model": 3}, {"model": ["a"]}, {"model": "x" * 300}, {"model": "\ud800"},
    {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": "0.5"}, {"temperature": True}, {"temperature": [1]},
    {"top_p": -0.1}, {"top_p": 1.1}, {"top_p": "1"}, {"top_k": -2}, {"top_k": 1.5}, {"top_k": 2**31}, {"top_k": "all"},
    {"n": 0}, {"n": -1}, {"n": 129}, {"n": 101}, {"n": 1.5}, {"n": "2"}, {"n": True},
    {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "16"}, {"max_tokens": 2**40}, {"max_tokens": True},
    {"seed": 1.5}, {"seed": "1"}, {"seed": 2**63}, {"seed": -(2**63) - 1},
    {"stop": ""}, {"stop": ["a", ""]}, {"stop": 5}, {"stop": [5]}, {"stop": ["a"] * 17}, {"stop": "a" * 257}, {"stop": {}},
    {"presence_penalty": 2.1}, {"presence_penalty": "1"}, {"frequency_penalty": -2.1}, {"frequency_penalty": []},
    {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"repetition_penalty": 101},
    {"stream": "yes"}, {"stream": 1}, {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": "yes"}}, {"stream": True, "stream_options": {"other": 1}},
    {"stream": True, "stream_options": []}, {"user": 5}, {"user": "u" * 513}, {"unknown": 1}, {"prompt_": "x"},
    {"return_experts": "yes"}, {"tools": [TOOL]}, {"tools": "all"}, {"tool_choice": "auto"}, {"functions": [{"name": "f"}]},
    {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema", "json_schema": {}}},
    {"guided_json": {}}, {"guided_regex": "a*"}, {"structured_outputs": {"json": {}}}, {"logit_bias": {"5": 100}},
    {"logit_bias": 5}, {"best_of": 2}, {"modalities": ["text", "audio"]}, {"min_p": 0.1}, {"ignore_eos": True},
    {"chat_template": "{{ 1 }}"}, {"stop_token_ids": [3]}, {"store": True},
]  # fmt: skip
OF_COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": None}, {"prompt": 5}, {"prompt": {}}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [True]}, {"prompt": [1.5]},
    {"prompt": [-1]}, {"prompt": [512]}, {"prompt": [2**40]}, {"prompt": ["a", 1]}, {"prompt": [[1], "a"]},
    {"prompt": [[[1]]]}, {"prompt": ["a"] * 1025}, {"prompt": ["a"] * 101}, {"prompt": "a\0b"}, {"prompt": "\ud800"},
    {"prompt": ["a", "\udfff"]}, {"prompt": "word " * 600}, {"prompt": "a" * 2**20}, {"prompt": [3] * 512},
    {"max_tokens": 0}, {"logprobs": -1}, {"logprobs": 21}, {"logprobs": True}, {"logprobs": "5"}, {"echo": "yes"},
    {"suffix": "end"}, {"messages": CHAT["messages"]},
]  # fmt: skip
OF_CHATS: list[dict[str, Any]] = [
    {"messages": None}, {"messages": []}, {"messages": "Hi"}, {"messages": {}}, {"messages": ["Hi"]}, {"messages": [{}]},
    {"messages": [{"role": "user"}]}, {"messages": [{"content": "Hi"}]}, {"messages": [{"role": "king", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": None}]}, {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": []}]}, {"messages": [{"role": "user", "content": ["Hi"]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {"messages": [{"role": "user", "content": [IMAGE]}]},
    {"messages": [{"role": "user", "content": [AUDIO]}]}, {"messages": [{"role": "user", "content": [{"type": 5}]}]},
    {"messages": [{"role": "tool", "content": "5", "tool_call_id": "a"}]},
    {"messages": [{"role": "assistant", "content": "", "tool_calls": [TOOL]}]},
    {"messages": [{"role": "user", "content": "Hi", "other": 1}]}, {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": [{"role": "user", "content": "Hi\0"}]}, {"messages": [{"role": "user", "content": "word " * 600}]},
    {"messages": CHAT["messages"] * 4097}, {"max_tokens": 0}, {"max_completion_tokens": 0},
    {"max_tokens": 1, "max_completion_tokens": 2}, {"logprobs": 3}, {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}, {"prompt": "Hi"}, {"echo": True},
]  # fmt: skip
RAW: list[bytes] = [
    b"", b"{", b"[]", b"null", b"5", b'"text"', b"\xff\xfe", b"{'model': 1}", b"[" * 100_000, b'{"a":' * 50_000,
    b'{"model": NaN}', b'{"temperature": 1e999, "model": "stories260k", "prompt": "a"}', b"1" * 10_000,
    b'{"model": "stories260k", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"model": "stories260k"}',
]  # fmt: skip


JSON = {"Content-Type": "application/json"}


def bodies() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(path, body, what is wrong in it) of more than 150 kinds."""
    kinds = [("completions", COMPLETION | change, change) for change in [*SHARED, *OF_COMPLETIONS]]
    return kinds + [("chat/completions", CHAT | change, change) for change in [*SHARED, *OF_CHATS]]


def malformed_bodies() -> list[tuple[str, bytes]]:
    """(path, body), what is no JSON object included."""
    return [(path, json.dumps(body).encode()) for path, body, _ in bodies()] + [("completions", raw) for raw in RAW]


def assert_refused(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error of a response in OpenAI's form."""
    assert response.status_code in (statuses or range(400, 500)), response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) <= 400
    assert "\n" not in error["message"]
    return error


def post(server: ServerProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    """Post a body whose text may have halves of characters."""
    return server.http.post(f"/v1/{path}", content=json.dumps(body).encode(), headers=JSON)


def test_bodies(server: ServerProcess):
    """Each is refused by name; afterwards the server answers as before, and nothing waits in it."""
    assert len(bodies()) > 150
    for path, body, change in bodies():
        response = post(server, path, body)
        assert response.status_code in (400, 404), (change, response.text)
        error = assert_refused(response)
        fault = error["message"] + (" n" if "answers" in error["message"] else "")  # n times the prompts
        assert any(re.search(rf"\b{name}\b", fault) for name in change), (change, error)
    assert post(server, "completions", COMPLETION).status_code == 200
    assert post(server, "chat/completions", CHAT).status_code == 200
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (CompletionRequest, {"prompt": [True] * 1000}), (CompletionRequest, {"prompt": [[-1] * 1000] * 10}),
        (CompletionRequest, {f"k{i}": 1 for i in range(1000)}), (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 200}]}),
    ],
)  # fmt: skip
def test_a_thousand_faults_cost_as_one(kind: type[Body], change: dict[str, Any]):
    """A body has room for a million, each of which would be an error of its own, and hold up all clients."""
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate({"model": BASE, **change})
    assert refusal.value.error_count() < 10


def test_values_that_ask_for_nothing_are_no_fault(server: ServerProcess):
    """Clients send them unasked."""
    nothing = {
        "tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "best_of": 1,
        "service_tier": "auto", "store": False, "temperature": None, "stop": None, "n": None, "seed": None, "user": "me",
        "stream_options": None, "top_p": None, "metadata": {}, "parallel_tool_calls": True,
    }  # fmt: skip
    for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        response = post(server, path, body | nothing)
        assert response.status_code == 200, response.text
    back = {"role": "assistant", "content": "Hello.", "refusal": None, "tool_calls": None}  # as answers have it
    turns = [*CHAT["messages"], back, {"role": "user", "content": "Go on."}]
    assert post(server, "chat/completions", CHAT | {"messages": turns}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"])
def test_what_is_no_json_object(server: ServerProcess, path: str):
    for body in RAW:
        assert_refused(server.http.post(path, content=body, headers=JSON), 400)
    text = json.dumps(COMPLETION)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert_refused(server.http.post(path, content=text, headers={"Content-Type": kind}), 400)


def test_sizes_and_paths(server: ServerProcess):
    large = b'{"model": "' + b"x" * 9 * 2**20 + b'"}'
    assert_refused(server.http.post("/v1/completions", content=large), 413)
    assert_refused(server.http.post("/v1/completions", content=(large for _ in range(1))), 413)  # in chunks
    assert_refused(server.http.get("/v1/nothing"), 404)
    assert_refused(server.http.get("/v1/completions"), 405)
    assert_refused(server.http.delete("/v1/models"), 405)
    error = assert_refused(server.http.get("/v1/models/nothing"), 404)
    assert error["code"] == "model_not_found"
    error = assert_refused(post(server, "completions", COMPLETION | {"model": "nothing"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /v1/models HTTP/1.1\r\n" + b"A: " + b"x" * 2**17 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http(server: ServerProcess, data: bytes):
    """A 4xx or the end of the connection answers it, and the next request is answered as ever."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        reply = b""
        with contextlib.suppress(OSError):  # the server has closed it
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(4096):
                reply += part
    assert reply == b"" or reply.startswith(b"HTTP/1.1 4")
    assert server.http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], f"{KEY}x", KEY.upper(), "\u00e9".encode()])
def test_wrong_keys(server: ServerProcess, key: str | bytes):
    """401 for every path with data, before the body is looked at; none for the page and the health."""
    value = b"Bearer " + (key if isinstance(key, bytes) else key.encode())
    for path in ("/v1/models", "/metrics", "/v1/completions", "/openapi.json", "/nothing"):
        response = httpx.post(f"{server.url}{path}", headers=[(b"Authorization", value)], content=b"{")
        assert assert_refused(response, 401)["code"] == "invalid_api_key"
        assert_refused(httpx.get(f"{server.url}{path}"), 401)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(server.url).status_code == 200
    assert_refused(httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Basic {KEY}"}), 401)
