"""The scheduler alone, over slots that do what a test says: order, queue, failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.serving.errors import APIError
from adafuse_jax.serving.metrics import Metrics
from adafuse_jax.serving.models import ServedModel
from adafuse_jax.serving.scheduler import MAX_FAILURES, Scheduler
from adafuse_jax.serving.work import Begun, Failed, Token, Work


@dataclass
class FakeRow:
    slot: int
    prompt: list[int]
    budget: int
    token_ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    experts: tuple = ()
    gates: tuple = ()
    logprobs: tuple = ()
    prompt_logprobs: tuple = ()
    cached: int = 0
    finish_reason: str | None = None


@dataclass
class FakeStep:
    rows: dict[int, FakeRow]


class FakeSlots:
    """Slots whose row with prompt [p] has the tokens p, p + 1, …, and that fail to take [0]; `fault(slots)`
    runs before each step."""

    def __init__(self, num_slots: int = 2, fault: Callable[[FakeSlots], None] = lambda slots: None):
        self.rows: dict[int, FakeRow] = {}
        self.num_slots, self.fault, self.order, self.steps = num_slots, fault, list[int](), 0

    @property
    def free(self) -> int:
        return self.num_slots - len(self.rows)

    def insert(self, prompt: list[int], *, max_new_tokens: int, **settings: Any) -> int:
        1 // prompt[0]
        slot = next(i for i in range(self.num_slots) if i not in self.rows)
        self.rows[slot] = FakeRow(slot, prompt, max_new_tokens)
        self.order.append(prompt[0])
        return slot

    def step(self) -> FakeStep:
        self.steps += 1
        self.fault(self)
        time.sleep(0.001)
        for row in self.rows.values():
            row.token_ids.append(row.prompt[0] + len(row.token_ids))
            row.seconds.append(0.0)
            row.finish_reason = row.finish_reason or ("length" if len(row.token_ids) == row.budget else None)
        return FakeStep(dict(self.rows))

    def evict(self, slot: int) -> FakeRow:
        return self.rows.pop(slot)

    def close(self) -> None:
        self.rows.clear()


class Run:
    """A scheduler over fake slots, and the events of its rows."""

    def __init__(self, *slots: FakeSlots, max_queue: int = 100):
        self.slots, self.ended = [*slots], list[bool]()
        left = iter(slots)
        self.scheduler = Scheduler(
            lambda: next(left), max_queue=max_queue, metrics=Metrics(slots[0].num_slots), on_end=self.ended.append
        )  # type: ignore[arg-type]
        self.events: asyncio.Queue[Any] = asyncio.Queue()

    def work(self, prompt: int, new_tokens: int = 3, is_loaded: bool = True) -> Work:
        model = ServedModel(name="m", adapter="m", tokenizer=None, stop_ids=(), created=0, is_loaded=is_loaded)
        return Work(
            index=prompt, model=model, prompt=[prompt], max_new_tokens=new_tokens, sampling=Sampling.of(), seed=0, sample=0,
            stop_ids=(), events=self.events,
        )  # fmt: skip

    async def answers(self, count: int) -> dict[int, list[int] | Failed]:
        """The tokens of so many rows to their ends, or their failures."""
        found: dict[int, Any] = {}
        done = 0
        while done < count:
            index, event = await asyncio.wait_for(self.events.get(), 10)
            if isinstance(event, Failed):
                found[index], done = event, done + 1
            elif isinstance(event, Token):
                found.setdefault(index, []).append(event.id)
                done += event.finish_reason is not None
            else:
                assert isinstance(event, Begun)
                assert index not in found
        return found

    async def end(self) -> None:
        self.scheduler.stop()
        while not self.ended:
            await asyncio.sleep(0.005)


def test_rows_are_served_in_their_order():
    """Ten rows over two slots: in order of arrival, each with its own tokens, and all slots free in the end."""

    async def run() -> None:
        slots = FakeSlots()
        test = Run(slots)
        test.scheduler.submit([test.work(i * 10, new_tokens=1 + i % 3) for i in range(1, 11)])
        test.scheduler.start(asyncio.get_running_loop())
        found = await test.answers(10)
        assert found == {i * 10: [i * 10 + n for n in range(1 + i % 3)] for i in range(1, 11)}
        assert slots.order == [i * 10 for i in range(1, 11)]
        assert slots.free == 2
        await test.end()
        assert test.ended == [False]

    asyncio.run(run())


def test_a_cancelled_row_leaves_before_the_next_step():
    """One that runs, and one that waits; neither has an event afterwards, and the queue has their places again."""

    async def run() -> None:
        slots = FakeSlots(1)
        test = Run(slots, max_queue=2)
        running, waiting, last = test.work(10, 10**6), test.work(20), test.work(30)
        test.scheduler.submit([running, waiting, last])
        with pytest.raises(APIError) as refusal:
            test.scheduler.submit([test.work(40)])
        assert refusal.value.status == 429
        test.scheduler.start(asyncio.get_running_loop())
        while (await test.events.get())[1] != Token(id=12, finish_reason=None):
            pass
        test.scheduler.cancel([running, waiting])
        steps = await test.scheduler.call(lambda: (slots.steps, [*slots.rows]))
        assert steps[1] == []
        later = [test.events.get_nowait() for _ in range(test.events.qsize())]
        for event in later:  # the third row may have begun
            if event[0] != 10:
                test.events.put_nowait(event)
        test.scheduler.submit([test.work(50), test.work(60)])
        assert await test.answers(3) == {30: [30, 31, 32], 50: [50, 51, 52], 60: [60, 61, 62]}
        assert slots.order == [10, 30, 50, 60]
        await test.end()

    asyncio.run(run())


def test_free_slots_are_places_too():
    """Two slots and no queue take two rows, and no third one until one of them has ended."""

    async def run() -> None:
        test = Run(FakeSlots(2), max_queue=0)
        test.scheduler.submit([test.work(10), test.work(20)])
        with pytest.raises(APIError) as refusal:
            test.scheduler.submit([test.work(30)])
        assert refusal.value.status == 429
        test.scheduler.start(asyncio.get_running_loop())
        await test.answers(2)
        test.scheduler.submit([test.work(30)])
        assert (await test.answers(1)).keys() == {30}
        await test.end()

    asyncio.run(run())


def test_rows_that_fail_alone():
    """An adapter unloaded while its row waited, and logits that are not finite; the row beside them is answered."""

    def fault(slots: FakeSlots) -> None:
        for row in slots.rows.values():
            if row.prompt == [20]:
                row.finish_reason = "not_finite"

    async def run() -> None:
        test = Run(FakeSlots(2, fault))
        test.scheduler.submit([test.work(10, is_loaded=False), test.work(20), test.work(30)])
        test.scheduler.start(asyncio.get_running_loop())
        found = await test.answers(3)
        assert (found[10].status, found[20].status, found[30]) == (404, 500, [30, 31, 32])
        assert "unloaded" in found[10].message
        await test.end()

    asyncio.run(run())


def test_a_row_that_cannot_be_inserted_is_told(caplog: pytest.LogCaptureFixture):
    """An error of the engine that is not the row's fault ends it with 500, not without an answer."""

    async def run() -> None:
        test = Run(FakeSlots(2), FakeSlots(2))
        test.scheduler.submit([test.work(0), test.work(10)])
        test.scheduler.start(asyncio.get_running_loop())
        found = await test.answers(2)
        assert (found[0].status, found[10]) == (500, [10, 11, 12])
        await test.end()

    asyncio.run(run())
    assert "ZeroDivisionError" in caplog.text


def fails(slots: FakeSlots) -> None:
    raise RuntimeError("out of memory")


def test_a_step_that_fails_takes_its_rows_and_no_others(caplog: pytest.LogCaptureFixture):
    """The rows in the slots get 500; those that wait are answered by new slots."""

    async def run() -> None:
        test = Run(FakeSlots(2, fails), FakeSlots(2))
        test.scheduler.submit([test.work(i) for i in (10, 20, 30)])
        test.scheduler.start(asyncio.get_running_loop())
        found = await test.answers(3)
        assert (found[10].status, found[20].status, found[30]) == (500, 500, [30, 31, 32])
        await test.end()
        assert test.ended == [False]

    asyncio.run(run())
    assert "2 rows with it: RuntimeError: out of memory" in caplog.text


def test_a_broken_device_ends_the_scheduler():
    """After `MAX_FAILURES` steps in a row it gives up, and the rows that wait end with an error."""

    async def run() -> None:
        test = Run(*[FakeSlots(1, fails)] * (MAX_FAILURES + 1))
        test.scheduler.submit([test.work(i) for i in range(1, MAX_FAILURES + 3)])
        test.scheduler.start(asyncio.get_running_loop())
        found = await test.answers(MAX_FAILURES + 2)
        assert [found[i].status for i in range(1, MAX_FAILURES + 3)] == [500] * MAX_FAILURES + [503] * 2
        while not test.ended:
            await asyncio.sleep(0.005)
        assert test.ended == [True]

    asyncio.run(run())
