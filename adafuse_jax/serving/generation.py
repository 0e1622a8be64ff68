"""From a request to its rows in the scheduler, and from their tokens to the reply, whole or streamed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.serving.errors import APIError, invalid
from adafuse_jax.serving.models import ServedModel
from adafuse_jax.serving.protocol import GenerationRequest
from adafuse_jax.serving.replies import DONE, Reply, server_sent
from adafuse_jax.serving.scheduler import Scheduler
from adafuse_jax.serving.text import Answer
from adafuse_jax.serving.work import Begun, Event, Failed, Token, Work

DEFAULT_TEMPERATURE = 1.0
GONE = 499
"""Status in the place of a reply to a client that has gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Contents of a request, beside its sampling. `prompts`: token ids, each for `per_prompt` answers."""

    model: ServedModel
    prompts: Sequence[list[int]]
    per_prompt: int
    max_new_tokens: int
    context_length: int
    logprobs: int | None
    scores_prompts: bool
    reply: Reply


class Generation:
    """The rows of one request. Whoever makes it calls `close` when nobody reads it any more."""

    def __init__(self, asked: Asked, body: GenerationRequest, scheduler: Scheduler):
        """Raises `APIError` 429 where the queue is full."""
        self._asked, self._scheduler = asked, scheduler
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
        sampling = sampling_of(body)
        # A scored prompt is followed by one token, whatever it is: clients cut it off.
        ends_early = not (asked.scores_prompts and asked.max_new_tokens <= 1)
        self._works = [
            Work(
                index=i * asked.per_prompt + sample, model=asked.model, prompt=ids,
                max_new_tokens=min(max(asked.max_new_tokens, 1), asked.context_length - len(ids)), sampling=sampling,
                seed=seed, sample=sample, stop_ids=asked.model.stop_ids if ends_early else (), events=self._events,
                logprobs=asked.logprobs, prompt_logprobs=asked.logprobs if asked.scores_prompts else None,
            )
            for i, ids in enumerate(asked.prompts)
            for sample in range(asked.per_prompt)
        ]  # fmt: skip
        self.answers = [Answer(asked.model, body.stops, work.prompt) for work in self._works]
        scheduler.submit(self._works)

    def close(self) -> None:
        """Free what the request still has in the scheduler."""
        left = [work for work in self._works if self.answers[work.index].finish_reason is None]
        if left:
            self._scheduler.cancel(left)

    async def pieces(self) -> AsyncIterator[tuple[int, Answer, str, Token | None]]:
        """(index, answer, text, token) as they come; no token: the row's prompt has been read. Raises `APIError`."""
        open_rows = len(self._works)
        while open_rows:
            index, event = await self._events.get()
            answer = self.answers[index]
            if isinstance(event, Failed):
                raise APIError(event.status, event.message)
            if answer.finish_reason is not None:
                continue  # tokens behind a stop string
            if isinstance(event, Begun):
                answer.begin(event)
                yield index, answer, "", None
                continue
            if self._asked.max_new_tokens == 0:  # echo alone
                answer.finish_reason = "length"
                open_rows -= 1
                yield index, answer, "", Token(id=None, finish_reason="length")
                continue
            text = answer.take(event)
            if answer.finish_reason is not None:
                open_rows -= 1
                if event.finish_reason is None:
                    self._scheduler.cancel([self._works[index]])
            yield index, answer, text, event

    async def whole(self) -> dict[str, Any]:
        async for _ in self.pieces():
            pass
        return self._asked.reply.whole(self.answers, self._asked.per_prompt)

    async def events(self, *, with_usage: bool) -> AsyncIterator[bytes]:
        """The stream of server-sent events, one a token. Tokens that came while earlier ones were sent are one event, unless
        each has log-probabilities or experts of its own."""
        reply = self._asked.reply
        held: dict[int, str] = {}
        try:
            async for index, answer, text, token in self.pieces():
                if token is None:
                    if (choice := reply.first(index, answer)) is not None:
                        yield server_sent(reply.chunk(choice))
                    continue
                held[index] = held.get(index, "") + text
                if reply.joins_tokens and answer.finish_reason is None and not self._events.empty():
                    continue
                for number in [*held]:
                    choice = reply.piece(number, self.answers[number], held.pop(number), token)
                    yield server_sent(reply.chunk(choice))
            if with_usage:
                yield server_sent(reply.usage_chunk(self.answers, self._asked.per_prompt))
        except APIError as error:
            yield server_sent(error.body())
        yield DONE


def sampling_of(body: GenerationRequest) -> Sampling:
    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return Sampling.of(
        temperature=given(body.temperature, DEFAULT_TEMPERATURE),
        top_k=max(given(body.top_k, 0), 0),
        top_p=max(given(body.top_p, 1.0), LEAST_TOP_P),
        repetition_penalty=given(body.repetition_penalty, 1.0),
        presence_penalty=given(body.presence_penalty, 0.0),
        frequency_penalty=given(body.frequency_penalty, 0.0),
    )


LEAST_TOP_P = 1e-30
"""In the place of 0: the likeliest token alone."""


class EventStream(StreamingResponse):
    """Server-sent events; `on_close` is called when they have been sent or the client has gone, in any case."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], on_close: Callable[[], None]):
        super().__init__(content)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def whole_or_gone(request: Request, generation: Generation) -> Response:
    """The whole reply, unless the client goes before it is there."""
    reply, gone = asyncio.ensure_future(generation.whole()), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(reply.result()) if reply.done() else Response(status_code=GONE)
    finally:
        for task in (reply, gone):
            task.cancel()
        await asyncio.gather(reply, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_number(rows: int, places: int, param: str) -> None:
    """Refuse a request with more rows than slots and queue have places."""
    if rows > places:
        raise invalid(
            f"{param}: the request asks for {rows} answers, and the server holds {places} at most; split it", param
        )
