"""The service around the answers: models, adapters that come and go, clients that go, a full queue, and the end."""

from __future__ import annotations

import concurrent.futures
import http.client
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny
from serving import BASE, Expected, ServerProcess
from test_malformed import assert_refused

LONG: dict[str, Any] = {"model": BASE, "prompt": "Once upon a time", "max_tokens": 480}
UNENDING = {"temperature": 2.0, "seed": 3}
"""Settings under which the model draws no end token for long."""


AUDIT = """
import atexit, gc, os, sys

def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        with open(os.environ["AUDITED"], "a") as file:
            file.write(f"{event} {arguments[1]}\\n")

def at_exit():
    with open(os.environ["FROZEN"], "w") as file:
        file.write(str(gc.get_freeze_count()))

sys.addaudithook(hook)
atexit.register(at_exit)
"""
"""A module that Python imports at its start: whom the process speaks to, beside those who have connected to it; and how many
objects its garbage collector passes over at its end."""


def start(server: ServerProcess, **changes: Any) -> Any:
    """A long streamed answer whose first token is there."""
    stream = server.openai.completions.create(**LONG | UNENDING | changes, stream=True)
    next(iter(stream))
    return stream


class TestModels:
    def test_list(self, server: ServerProcess):
        models = {model.id: model for model in server.openai.models.list().data}
        assert [*models] == [BASE, "tales", "verse", "plain"]
        assert models["tales"].parent == BASE
        assert server.openai.models.retrieve("plain").id == "plain"
        with pytest.raises(openai.NotFoundError):
            server.openai.models.retrieve("poems")

    def test_adapters_come_and_go(self, server: ServerProcess, expected: Expected, adapters: dict[str, Path]):
        """While a row of another adapter runs; an adapter's row ends as it began when its adapter is unloaded."""
        running = start(server, model="verse")
        body = {"lora_name": "again", "lora_path": str(adapters["tales"])}
        response = server.http.post("/v1/load_lora_adapter", json=body)
        assert response.text == "Success: LoRA adapter 'again' added successfully."
        assert assert_refused(server.http.post("/v1/load_lora_adapter", json=body), 400)["param"] == "lora_name"
        ask: dict[str, Any] = {"model": "again", "prompt": "The dog was", "max_tokens": 16, "temperature": 0}
        (wanted,) = expected.completions("tales", ["The dog was"], 16)
        assert server.openai.completions.create(**ask).choices[0].text == wanted.text
        old = start(server, model="again")
        response = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "again"})
        assert response.text == "Success: LoRA adapter 'again' removed successfully."
        with pytest.raises(openai.NotFoundError):
            server.openai.completions.create(**ask)
        assert_refused(server.http.post("/v1/unload_lora_adapter", json={"lora_name": "again"}), 404)
        assert server.http.post("/v1/load_lora_adapter", json={**body, "lora_path": "plain"}).status_code == 200
        (wanted,) = expected.completions("plain", ["The dog was"], 16)
        assert server.openai.completions.create(**ask).choices[0].text == wanted.text, "a new one of the same name"
        assert [chunk.choices[0].finish_reason for chunk in old][-1] in ("length", "stop")
        running.close()
        assert server.metric("generation_tokens_total", 'model="again"') > 0
        assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
        assert 'model="again"' not in server.http.get("/metrics").text

    def test_a_row_never_has_another_adapter_of_its_name(self, server: ServerProcess):
        """One that waits while its adapter is unloaded, and another one loaded under the name, gets 404."""
        load = {"lora_name": "again", "lora_path": "tales"}
        assert server.http.post("/v1/load_lora_adapter", json=load).status_code == 200
        running = start(server, n=4)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ask = {"model": "again", "prompt": "The dog was", "max_tokens": 1}
            waiting = pool.submit(server.http.post, "/v1/completions", json=ask)
            while not server.metric("requests_waiting"):
                time.sleep(0.01)
            assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
            assert server.http.post("/v1/load_lora_adapter", json={**load, "lora_path": "plain"}).status_code == 200
            running.close()
            assert "unloaded" in assert_refused(waiting.result(), 404)["message"]
        assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200

    def test_paths_are_confined(self, server: ServerProcess, adapters: dict[str, Path], tmp_path: Path):
        folder = adapters["tales"].parent
        outside = tmp_path / "outside"
        shutil.copytree(adapters["tales"], outside)
        (folder / "link").symlink_to(outside)
        paths = [
            str(outside),
            f"{folder}/../{tmp_path.name}/outside",
            "/etc",
            "..",
            ".",
            str(folder),
            "link",
            "/proc/self/root",
        ]
        for path in paths:
            body = {"lora_name": "secret", "lora_path": path}
            error = assert_refused(server.http.post("/v1/load_lora_adapter", json=body), 403)
            assert error["param"] == "lora_path"
        for path in ("nowhere", "tales/adapter_config.json", "x" * 300, "x/" * 2000):
            body = {"lora_name": "secret", "lora_path": path}
            assert_refused(server.http.post("/v1/load_lora_adapter", json=body), 400)
        (folder / "empty").mkdir(exist_ok=True)
        for name, path in (("secret", "empty"), ("a b", "tales"), (BASE, "tales")):
            response = server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
            assert_refused(response, 400)


class TestClientsThatGo:
    @pytest.mark.parametrize("stream", [False, True])
    def test_free_their_slot(self, server: ServerProcess, stream: bool):
        """Four clients take the four slots and go; the fifth is answered long before theirs would have ended."""
        cancelled = server.metric("requests_total", "cancelled")
        body = {**LONG, **UNENDING, "n": 4, "stream": stream}
        if stream:
            with server.http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                server.http.post("/v1/completions", json=body, timeout=0.5)
        reply = server.openai.completions.create(model=BASE, prompt="A", max_tokens=2)
        assert reply.usage.completion_tokens <= 2
        server.wait_until_idle()
        assert server.metric("requests_total", "cancelled") == cancelled + 4

    def test_whose_rows_wait(self, server: ServerProcess):
        """A client that goes before its row has a slot leaves the queue."""
        running = start(server, n=4)
        with pytest.raises(openai.APITimeoutError):
            server.openai.with_options(timeout=0.3).completions.create(**LONG)
        deadline = time.monotonic() + 5
        while server.metric("requests_waiting") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (server.metric("requests_waiting"), server.metric("requests_running")) == (0, 4)
        running.close()
        server.wait_until_idle()


def test_a_full_queue_refuses(server: ServerProcess):
    """Rows beyond the queue's 96 get 429 with Retry-After, at once; those in it are answered."""
    running = start(server, n=4)
    ask = {"model": BASE, "prompt": "The dog", "max_tokens": 1}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(server.http.post, "/v1/completions", json={**ask, "n": 90})
        while server.metric("requests_waiting") < 90:
            time.sleep(0.01)
        refused = server.http.post("/v1/completions", json={**ask, "n": 7})
        assert assert_refused(refused, 429)["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        assert_refused(server.http.post("/v1/completions", json={**ask, "n": 7, "stream": True}), 429)
        running.close()
        answered = waiting.result().json()
    assert len(answered["choices"]) == 90
    assert server.metric("requests_refused_total") >= 2


def test_metrics(server: ServerProcess):
    before = {name: server.metric(name) for name in ("generation_tokens_total", "time_to_first_token_seconds_count")}
    between = server.metric("time_between_tokens_seconds_count")
    reply = server.openai.completions.create(model="tales", prompt="The dog was", max_tokens=6, temperature=0)
    assert reply.usage.completion_tokens == 6
    assert server.metric("generation_tokens_total") == before["generation_tokens_total"] + 6
    assert server.metric("time_to_first_token_seconds_count") == before["time_to_first_token_seconds_count"] + 1
    assert server.metric("time_between_tokens_seconds_count") == between + 5
    assert server.metric("slots") == 4
    assert server.metric("kv_slots_used_ratio") == 0
    assert server.http.get("/metrics").headers["content-type"].startswith("text/plain")


def test_health_and_headers(server: ServerProcess):
    assert server.http.get("/health").json() == {"status": "ok"}
    page = server.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    for response in (page, server.http.get("/v1/models"), httpx.get(f"{server.url}/v1/models")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_the_end(flags: list[Any], tmp_path: Path):
    """SIGTERM: a row that runs is answered in full, new work gets 503; the second signal cuts off what is left; exit code 0.
    Without a key, names of other hosts are refused, and without folders of adapters, their loading. From its start to its
    end the process connects to nobody. What was there before the first request is not looked through for garbage."""
    (tmp_path / "sitecustomize.py").write_text(AUDIT)
    files = {name: str(tmp_path / name.lower()) for name in ("AUDITED", "FROZEN")}
    audit = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tiny.REPOSITORY}", **files}
    with ServerProcess(flags, tmp_path / "log", environment=audit) as server:
        assert_refused(httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}), 403)
        load = {"lora_name": "x", "lora_path": "tales"}
        assert_refused(server.http.post("/v1/load_lora_adapter", json=load), 403)
        assert_refused(server.http.post("/v1/unload_lora_adapter", json={"lora_name": "tales"}), 403)
        long, short = start(server), start(server, max_tokens=100)
        server.process.send_signal(signal.SIGTERM)
        while server.http.get("/health").status_code == 200:
            time.sleep(0.01)
        ask = {"model": BASE, "prompt": "The dog", "max_tokens": 1}
        assert_refused(server.http.post("/v1/completions", json=ask), 503)
        assert [*short][-1].choices[0].finish_reason in ("length", "stop")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stops"):
            list(long)
        assert server.process.wait(timeout=30) == 0
        assert time.monotonic() - begun < 10
        assert "1 requests are cut off" in server.log.read_text()
        assert not server.faults()
        events = (tmp_path / "audited").read_text().splitlines()
        assert "socket.bind ('127.0.0.1', 0)" in events
        assert [event for event in events if not event.startswith("socket.bind")] == []
        assert int((tmp_path / "frozen").read_text()) > 100_000


@pytest.mark.slow
def test_a_killed_server_leaves_its_port(flags: list[Any], tmp_path: Path):
    """To the next one, which knows nothing of the rows that ran."""
    with ServerProcess(flags, tmp_path / "log") as server:
        port = server.port
        start(server)
        server.process.kill()
        server.process.wait()
    with ServerProcess([*flags, "--port", port], tmp_path / "log") as server:
        assert server.port == port
        assert server.metric("requests_running") == 0
        assert server.openai.completions.create(**LONG | {"max_tokens": 4}).usage.completion_tokens == 4
        assert server.terminate() == 0


@pytest.mark.slow
def test_an_idle_connection_stays_open(server: ServerProcess):
    """For longer than the 5 s of common clients, and of uvicorn: with both the same, a request may meet its end."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.connect()
    opened = connection.sock
    for pause in (6, 0):
        connection.request("GET", "/health")
        response = connection.getresponse()
        assert response.status == 200
        assert response.read() == b'{"status":"ok"}'
        assert connection.sock is opened
        time.sleep(pause)
    connection.close()
