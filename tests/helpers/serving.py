"""A real server process, adapters of the model that it serves, and what `decode.py` answers in its place."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import tiny
from data_fixtures import CHATML
from random_models import random_adapter, random_method

from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.prompts import Prompt
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.session import Completion, Session

BASE, KEY = "stories260k", "a-key-of-the-tests"
START_SECONDS = 120
SERVING = re.compile(r"serving on http://[\d.]+:(\d+)")


def write_adapters(model_dir: Path, out: Path) -> dict[str, Path]:
    """Three adapters with random B: two AdaFuse ones, the second with a chat template of its own, and a LoRA."""
    checkpoint = HFCheckpoint.open(str(model_dir))
    config = checkpoint.config
    made: dict[str, AnyAdapter] = {
        "tales": random_adapter(config, seed=1, targets=("q_proj", "v_proj"), alpha=12.0),
        "verse": random_adapter(config, seed=2, targets=("q_proj", "down_proj"), num_experts=3),
        "plain": random_method("lora", config, seed=3, targets=("q_proj", "v_proj"), alpha=24.0),
    }
    for name, adapter in made.items():
        save_adapter(adapter, out / name, backbone_name=str(model_dir), backbone_identity=checkpoint.identity())
    (out / "verse" / "chat_template.jinja").write_text(CHATML)
    return {name: out / name for name in made}


@dataclass
class ServerProcess:
    """`python -m adafuse_jax.serving` with `flags`, on a free port unless they name one."""

    flags: Sequence[object]
    log: Path
    key: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = field(init=False)

    def __enter__(self) -> ServerProcess:
        port = [] if "--port" in self.flags else ["--port", "0"]
        command = [sys.executable, "-m", "adafuse_jax.serving", *map(str, self.flags), *port]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=tiny.REPOSITORY, env=tiny.environment() | {**self.environment}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        begun = time.monotonic()
        while (found := SERVING.search(self.log.read_text())) is None:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - begun < START_SECONDS, self.log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=120)

    def terminate(self) -> int:
        """Send SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def metric(self, name: str, labels: str = "") -> float:
        """A metric, summed over the series whose labels contain the text `labels`."""
        series = re.findall(rf"^adafuse_{name}(?:{{(.*)}})? (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return sum(float(value) for own, value in series if labels in own)

    def wait_until_idle(self, seconds: float = 30) -> None:
        begun = time.monotonic()
        while self.metric("requests_running") + self.metric("requests_waiting"):
            assert time.monotonic() - begun < seconds, "rows are left in the slots"
            time.sleep(0.02)

    def faults(self) -> list[str]:
        """Lines of the log that tell of a bug."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if re.search(r"Traceback|Error\b|Exception|failed", line)]

    def usage(self) -> tuple[int, int]:
        """(resident bytes, threads)."""
        process = psutil.Process(self.process.pid)
        return process.memory_info().rss, process.num_threads()


class Expected:
    """The answers of `decode.py --raw`, greedy in float32."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path]):
        self._model, self._adapters = model_dir, adapters
        self._sessions: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = Session(self._config(name))
        return self._sessions[name]

    def completions(self, name: str, prompts: Sequence[Prompt], max_tokens: int, **settings: Any) -> list[Completion]:
        session = self.session(name)
        session.config = self._config(name, max_new_tokens=max_tokens, **settings)
        session.sampling = Sampling.of(repetition_penalty=session.config.repetition_penalty)
        return session.answer_all([session.tokens_of(prompt) for prompt in prompts])

    def _config(self, name: str, **settings: Any) -> DecodeConfig:
        adapter = str(self._adapters[name]) if name in self._adapters else None
        return DecodeConfig(model=str(self._model), adapter=adapter, dtype="float32", raw=True, **settings)
