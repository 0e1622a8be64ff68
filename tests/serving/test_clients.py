"""Other programs as clients: lm-evaluation-harness, schemathesis, a browser, and many clients at once for long."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import lm_eval
import pytest
import schemathesis
from goldens.lm_eval_cases import write_tasks
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import sampled_from
from lm_eval.tasks import TaskManager
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from serving import BASE, KEY, Expected, ServerProcess
from test_malformed import JSON, malformed_bodies

from adafuse_jax.evaluation.lm_eval import AdaFuseLM
from adafuse_jax.evaluation.loading import load

NAMES = (BASE, "tales", "verse", "plain")


class TestLmEval:
    @pytest.mark.slow
    def test_its_own_client_gets_the_numbers_of_our_backend(
        self,
        server: ServerProcess,
        stories260k_dir: Path,
        adapters: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """Questions of several choices, scored, and answers generated, with an adapter."""
        pytest.importorskip("tenacity", reason="a requirement of lm-eval[api]")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        tasks = ["tiny_choices", "tiny_answers"]
        options: dict[str, Any] = {
            "tasks": tasks, "bootstrap_iters": 0,
            "task_manager": TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False),
        }  # fmt: skip
        loaded = load(str(stories260k_dir), str(adapters["tales"]), "float32")
        ours = lm_eval.simple_evaluate(AdaFuseLM(loaded, batch_size=4), **options)
        arguments = {
            "model": "tales", "base_url": f"{server.url}/v1/completions", "tokenizer": str(stories260k_dir),
            "add_bos_token": True, "batch_size": 4, "max_length": 512,
        }  # fmt: skip
        theirs = lm_eval.simple_evaluate("local-completions", model_args=arguments, **options)
        for task in tasks:
            pairs = zip(*(run["samples"][task] for run in (ours, theirs)), strict=True)
            for mine, other in pairs:
                if task == "tiny_answers":
                    assert [text.strip() for text in other["filtered_resps"]] == [
                        t.strip() for t in mine["filtered_resps"]
                    ]
                    continue
                for (score, greedy), (wanted, wanted_greedy) in zip(
                    other["filtered_resps"], mine["filtered_resps"], strict=True
                ):
                    assert score == pytest.approx(wanted, abs=1e-3)
                    assert greedy == wanted_greedy
            for metric, value in ours["results"][task].items():
                if isinstance(value, float):
                    assert theirs["results"][task][metric] == pytest.approx(value, abs=1e-6)


def test_schemathesis_finds_no_5xx(server: ServerProcess):
    """Bodies drawn from the server's own OpenAPI document: as drawn, of a model that there is, or with no setting beside."""
    plain = {"prompt", "messages", "stream", "echo", "user"}
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 8
    statuses: dict[str, set[int]] = {}
    for operation in operations:

        @given(case=operation.as_strategy(), kind=sampled_from(["drawn", "real", "plain"]))
        @settings(
            max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        def check(case: Any, kind: str, seen: set[int]) -> None:
            if kind != "drawn" and isinstance(case.body, dict) and "model" in case.body:
                kept = {name: value for name, value in case.body.items() if kind == "real" or name in plain}
                case.body = {**kept, "model": "tales", "max_tokens": 2}
            response = case.call(headers=headers)
            seen.add(response.status_code)
            assert response.status_code < 500, response.text

        check(seen=statuses.setdefault(operation.label, set()))
    assert all(statuses.values())
    assert 200 in statuses["POST /v1/completions"]


class TestManyClients:
    """Clients of mixed adapters at once, a third of which go before their answer is there; some requests are malformed, each
    in a way of its own."""

    PROMPTS = ("Once upon a time", "The dog was", "Lily and Tom went to", "One day, a girl")

    @pytest.mark.parametrize(("clients", "requests"), [(16, 48), pytest.param(64, 2000, marks=pytest.mark.slow)])
    def test_every_answer_is_its_own(self, server: ServerProcess, expected: Expected, clients: int, requests: int):
        wanted = {
            (name, prompt): answer.text
            for name in NAMES
            for prompt, answer in zip(self.PROMPTS, expected.completions(name, self.PROMPTS, 20), strict=True)
        }
        warm = asyncio.run(self._run(server, wanted, clients, 24, seed=1))
        server.wait_until_idle()
        memory, threads = server.usage()
        counts = asyncio.run(self._run(server, wanted, clients, requests, seed=2))
        server.wait_until_idle(60)
        assert sum(counts.values()) == requests
        assert counts["wrong"] == warm["wrong"] == 0
        assert counts["answered"] > requests / 4
        assert counts["gone"] > requests / 10
        assert counts["refused"] > requests / 20
        more_memory, more_threads = server.usage()
        assert more_threads <= threads + 1
        assert more_memory < memory + 64 * 2**20
        assert not server.faults()

    async def _run(
        self, server: ServerProcess, wanted: dict[tuple[str, str], str], clients: int, requests: int, *, seed: int
    ) -> dict[str, int]:
        rng, malformed = random.Random(seed), malformed_bodies()
        counts = dict.fromkeys(("answered", "gone", "refused", "wrong"), 0)
        jobs = [(*rng.choice([*wanted]), rng.random() < 0.5, rng.random()) for _ in range(requests)]
        headers, limits = {"Authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=clients)

        async def client(own: httpx.AsyncClient) -> None:
            while jobs:
                name, prompt, stream, chance = jobs.pop()
                body = {"model": name, "prompt": prompt, "max_tokens": 20, "temperature": 0, "stream": stream}
                if chance > 0.85:
                    path, content = rng.choice(malformed)
                    response = await own.post(f"/v1/{path}", content=content, headers=JSON)
                    counts["refused" if response.status_code in (400, 404) else "wrong"] += 1
                    continue
                try:
                    async with asyncio.timeout(rng.uniform(0, 0.1) if chance < 0.3 else None):
                        text = await ask(own, body)
                except TimeoutError:
                    counts["gone"] += 1
                    continue
                if text is None:
                    jobs.append((name, prompt, stream, chance))  # the queue is full
                    await asyncio.sleep(0.05)
                    continue
                counts["answered" if text == wanted[name, prompt] else "wrong"] += 1

        async with (
            httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=120) as own,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(clients):
                group.create_task(client(own))
        return counts


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str | None:
    """The text of an answer; None where the queue is full."""
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        return None if response.status_code == 429 else response.json()["choices"][0]["text"]
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            return None
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_the_page(server: ServerProcess, browser: Any):
    """A chat with an adapter in Chromium: tokens have the colours of their experts, hovering shows gates, the strip moves,
    a second turn follows the first, and the policy of the page stops nothing of it."""
    browser.get(server.url)
    wait = WebDriverWait(browser, 30)
    browser.find_element(By.ID, "key").send_keys(KEY, Keys.TAB)
    choice = Select(browser.find_element(By.ID, "model"))
    wait.until(lambda _: [option.text for option in choice.options] == [*NAMES])
    choice.select_by_visible_text("verse")
    prompt, tokens = browser.find_element(By.ID, "prompt"), browser.find_element(By.ID, "tokens")
    tokens.clear()
    tokens.send_keys("30")

    def answers() -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, ".turn.assistant")

    def is_ready() -> bool:
        return browser.find_element(By.ID, "send").text == "Send"

    for turn in (1, 2):
        prompt.send_keys("Tell a tale.", Keys.ENTER)
        wait.until(lambda _, turn=turn: len(answers()) == turn and answers()[-1].text and is_ready())
    spans = answers()[0].find_elements(By.CSS_SELECTOR, ".token")
    marked = [span for span in spans if span.get_attribute("data-gates")]
    assert len(marked) >= 2
    assert "linear-gradient" in marked[0].value_of_css_property("border-image-source")
    webdriver.ActionChains(browser).move_to_element(marked[1]).perform()
    gates = browser.find_element(By.ID, "gates").text
    assert gates == marked[1].get_attribute("data-gates")
    assert "expert" in gates
    wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#load .bar")) >= 2)
    assert not browser.find_elements(By.CSS_SELECTOR, ".turn.error")
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "401" not in message] == []  # asked once before it had the key
