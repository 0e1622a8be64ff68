"""A load on a server: closed loops of clients, Poisson arrivals, and the times at which tokens come.

The client speaks HTTP over plain sockets: 32 streams of a fast server keep a general client library busier than the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.serving.requests import Asked

EVENT = b"data: {"


@dataclass(slots=True)
class Served:
    """Host times of one request: when it was sent, and when each of its tokens came; in seconds."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    error: str | None = None


async def ask(port: int, asked: Asked) -> Served:
    """Send a request and read its stream to the end."""
    body = {
        "model": asked.model,
        "prompt": asked.prompt,
        "max_tokens": asked.new_tokens,
        "temperature": 0,
        "stream": True,
    }
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    )
    served = Served(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        status = (await reader.readline()).split()[1:2]
        async for line in reader:
            if line.startswith(EVENT):
                now, event = time.perf_counter(), json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    served.error = str(event["error"])
                else:  # a word is a token; several in one event have come together
                    served.tokens += [now] * len(event["choices"][0]["text"].split())
        if status != [b"200"]:
            served.error = f"status {status}"
    finally:
        writer.close()
    return served


async def closed_loop(port: int, requests: Sequence[Asked], clients: int) -> list[Served]:
    """Each client sends its next request when its last one has been answered."""
    left, found = list(reversed(requests)), []

    async def client() -> None:
        while left:
            found.append(await ask(port, left.pop()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def poisson(port: int, requests: Sequence[Asked], rate: float, seed: int = 0) -> list[Served]:
    """Requests arrive at random, `rate` a second."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))

    async def later(asked: Asked, at: float) -> Served:
        await asyncio.sleep(at)
        return await ask(port, asked)

    return list(await asyncio.gather(*(later(a, at) for a, at in zip(requests, np.cumsum(gaps), strict=True))))


async def disturbed(port: int, requests: Sequence[Asked], clients: int, intruders: Sequence[Asked]) -> list[Served]:
    """A closed loop, while one of `intruders`, long prompts, arrives each second; their own times do not count."""

    async def intrude() -> None:
        async with asyncio.TaskGroup() as group:
            for intruder in intruders:
                group.create_task(ask(port, intruder))
                await asyncio.sleep(1)

    task = asyncio.create_task(intrude())
    try:
        return await closed_loop(port, requests, clients)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Tokens a second over the whole load; medians and 99th percentiles, in milliseconds, of the time to the first token and
    between tokens."""
    errors = [s.error for s in served if s.error or not s.tokens]
    if errors:
        return {"error": f"{len(errors)} of {len(served)} requests failed: {errors[0]}"}
    first = [1e3 * (s.tokens[0] - s.sent) for s in served]
    between = [1e3 * gap for s in served for gap in np.diff(s.tokens)]
    seconds = max(s.tokens[-1] for s in served) - min(s.sent for s in served)
    tokens = sum(len(s.tokens) for s in served)
    return {
        "requests": len(served), "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
        "first_ms": percentiles(first), "between_ms": percentiles(between),
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.percentile(values or [np.nan], at)) for name, at in (("median", 50), ("p99", 99))}
