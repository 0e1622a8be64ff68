"""The service behind the endpoints: which requests are admitted, how they become generations, adapters that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from adafuse_jax.core.errors import UserError
from adafuse_jax.serving.config import NAME, ServeConfig
from adafuse_jax.serving.errors import APIError, invalid, queue_full
from adafuse_jax.serving.generation import Asked, EventStream, Generation, check_number, whole_or_gone
from adafuse_jax.serving.metrics import Metrics
from adafuse_jax.serving.models import AdapterReader, Models, ServedModel
from adafuse_jax.serving.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from adafuse_jax.serving.replies import ChatReply, CompletionReply
from adafuse_jax.serving.scheduler import Scheduler
from adafuse_jax.serving.security import confined
from adafuse_jax.serving.text import chat_ids, prompt_ids


class Service:
    """The parts behind the endpoints, used in the event loop. `open_requests` are those that generate, from before their
    text is read to their last byte."""

    def __init__(
        self, config: ServeConfig, models: Models, reader: AdapterReader | None, on_end: Callable[[bool], None]
    ):
        """`reader` may be None where `--adapter-folders` are not given."""
        self.config, self.models, self.metrics = config, models, Metrics(config.max_slots)
        self._reader = reader
        more: dict[str, Any] = {"warm_up": models.warm_up} if config.warm_up else {}
        self.scheduler = Scheduler(
            models.slots, max_queue=config.max_queue, metrics=self.metrics, on_end=on_end, **more
        )
        self.is_draining, self.open_requests = False, 0
        # One long prompt at a time, beside the event loop
        self._text = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._adapters = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.scheduler.start(asyncio.get_running_loop())
        yield
        self._text.shutdown(cancel_futures=True)

    @property
    def places(self) -> int:
        """Rows that run and wait, at most."""
        return self.config.max_slots + self.config.max_queue

    @property
    def is_serving(self) -> bool:
        return not self.is_draining and self.scheduler.is_alive

    def find(self, name: str) -> ServedModel:
        model = self.models.find(name)
        if model is None:
            raise APIError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return model

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        model, per_prompt = self.find(body.model), body.n or 1
        check_number(len(body.prompts) * per_prompt, self.places, "prompt")

        def asked() -> Asked:
            prompts = [prompt_ids(model, prompt, **self._limits) for prompt in body.prompts]
            texts = None
            if body.echo:
                texts = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in body.prompts]
            options = {"logprobs": body.logprobs, "with_experts": bool(body.return_experts)}
            return Asked(
                model=model, prompts=prompts, per_prompt=per_prompt,
                max_new_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
                context_length=self.models.context_length, logprobs=body.logprobs,
                scores_prompts=bool(body.echo) and body.logprobs is not None,
                reply=CompletionReply(model.name, texts, per_prompt, **options),
            )  # fmt: skip

        return await self._answer(asked, body, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        model, per_prompt, context = self.find(body.model), body.n or 1, self.models.context_length
        check_number(per_prompt, self.places, "n")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None

        def asked() -> Asked:
            return Asked(
                model=model, prompts=[chat_ids(model, body.messages, **self._limits)], per_prompt=per_prompt,
                max_new_tokens=body.max_completion_tokens or body.max_tokens or context, context_length=context,
                logprobs=logprobs, scores_prompts=False,
                reply=ChatReply(model.name, logprobs=logprobs, with_experts=bool(body.return_experts)),
            )  # fmt: skip

        return await self._answer(asked, body, request)

    @property
    def _limits(self) -> dict[str, int]:
        return {"max_tokens": self.models.context_length, "vocab_size": self.models.vocab_size}

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Context of a request that generates. Raises `APIError` 503 while the server stops, and 429 for more requests than
        slots and queue have places, before their text costs anything."""
        if not self.is_serving:
            raise APIError(503, "the server stops; try again later")
        if self.open_requests >= self.places:
            self.metrics.refused.inc()
            raise queue_full(self.config.max_queue)
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    async def _answer(self, make_asked: Callable[[], Asked], body: GenerationRequest, request: Request) -> Response:
        """The reply; `make_asked` reads the text, and may take long. A stream closes what it holds at its end."""
        with contextlib.ExitStack() as context:
            context.enter_context(self._admitted())
            asked = await asyncio.get_running_loop().run_in_executor(self._text, make_asked)
            generation = Generation(asked, body, self.scheduler)
            context.callback(generation.close)
            if not body.stream:
                return await whole_or_gone(request, generation)
            return EventStream(generation.events(with_usage=body.includes_usage), context.pop_all().close)

    async def load_adapter(self, body: LoadAdapterRequest) -> None:
        """Read an adapter beside the event loop, then give it to the engine between two steps."""
        reader, name = self._adapters_reader(), body.lora_name
        if not NAME.fullmatch(name):
            raise invalid("lora_name: use letters, digits and . _ / : - only", "lora_name")
        directory = confined(body.lora_path, self.config.adapter_folders)
        async with self._adapters:
            if self.models.find(name) is not None:
                raise invalid(f"lora_name: {name} is loaded already; unload it first, or use another name", "lora_name")
            try:
                read = await asyncio.to_thread(reader.read, name, str(directory))
                prepared = await asyncio.to_thread(self.models.prepare, read)
                await self.scheduler.call(lambda: self.models.add(read, now=int(time.time()), prepared=prepared))
            except UserError as error:
                raise invalid(str(error), "lora_path") from error

    async def unload_adapter(self, body: UnloadAdapterRequest) -> None:
        self._adapters_reader()
        name = body.lora_name
        async with self._adapters:
            if name not in self.models.adapters:
                raise APIError(404, f"no adapter {name!r} is loaded", param="lora_name", code="model_not_found")
            await self.scheduler.call(lambda: self._remove(name))

    def _remove(self, name: str) -> None:
        self.models.remove(name)
        self.metrics.remove(name)

    def _adapters_reader(self) -> AdapterReader:
        """The reader of adapters. Raises `APIError` 403 where they cannot be loaded."""
        if not self.config.adapter_folders or self._reader is None:
            raise APIError(403, "adapters cannot be loaded or unloaded here; start the server with --adapter-folders")
        if not self.is_serving:
            raise APIError(503, "the server stops; try again later")
        return self._reader
