"""Metrics of the server for Prometheus, at `/metrics`. They are kept in memory, and nothing sends them anywhere."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from adafuse_jax.inference.rows import Row
from adafuse_jax.serving.work import Work

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts and times. The scheduler's thread writes them, but for `refused`."""

    def __init__(self, num_slots: int):
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "adafuse"}
        self._running = Gauge("requests_running", "rows in slots", **made)
        self._waiting = Gauge("requests_waiting", "rows that wait for a slot", **made)
        Gauge("slots", "rows that can be decoded together", **made).set(num_slots)
        self._used = Gauge("kv_slots_used_ratio", "used share of the slots of the KV cache", **made)
        self._prompt = Counter("prompt_tokens", "tokens of prompts", **made)
        self._cached = Counter("cached_prompt_tokens", "tokens of prompts that were read from the cache", **made)
        self._generated = Counter("generation_tokens", "tokens generated", ["model"], **made)
        self._ended = Counter("requests", "rows that have ended, by outcome", ["outcome"], **made)
        self.refused = Counter("requests_refused", "requests that the full queue has refused", **made)
        self._first = Histogram("time_to_first_token_seconds", "from arrival", buckets=SECONDS, **made)
        self._between = Histogram("time_between_tokens_seconds", "of a row", buckets=SECONDS, **made)
        self._experts = Counter("expert_tokens", "tokens read by each expert", ["model", "expert"], **made)
        self._num_slots = num_slots

    def rows(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._used.set(running / self._num_slots)

    def token(self, work: Work, row: Row, now: float) -> None:
        """The newest token of a row, at host time `now`."""
        if work.read:
            self._between.observe(now - work.last)
        else:
            self._first.observe(now - work.arrived)
            self._prompt.inc(len(row.prompt))
            self._cached.inc(row.cached)
        if not work.model.is_loaded:
            return  # its series have been removed
        name = work.model.name
        self._generated.labels(name).inc()
        if work.read and row.experts:
            for expert in row.experts[-1].ravel().tolist():
                self._experts.labels(name, str(expert)).inc()

    def remove(self, model: str) -> None:
        """Remove the series of an adapter that is unloaded: names come and go, and memory is bounded."""
        for metric in (self._generated, self._experts):
            metric.remove_by_labels({"model": model})

    def ended(self, work: Work, outcome: str) -> None:
        self._ended.labels(outcome).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
