"""The application: OpenAI's endpoints, vLLM's for adapters, health, metrics and the page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from adafuse_jax.core.errors import UserError
from adafuse_jax.serving import page
from adafuse_jax.serving.config import NAME, ServeConfig
from adafuse_jax.serving.errors import APIError, invalid, of_validation
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
from adafuse_jax.serving.security import Gate, confined
from adafuse_jax.serving.text import chat_ids, prompt_ids

log = logging.getLogger(__name__)

NO_TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "the request is refused; the message says why"),
        (401, "wrong key"),
        (403, "not allowed"),
        (404, "no such model or path"),
        (429, "the queue is full"),
        (503, "the server stops"),
    )
}


class Service:
    """The parts behind the endpoints. Requests come in the event loop; `open_requests` are those that generate."""

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
        self._text = ThreadPoolExecutor(
            1, thread_name_prefix="text"
        )  # one long prompt at a time, beside the event loop
        self._adapters = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.scheduler.start(asyncio.get_running_loop())
        yield
        self._text.shutdown(cancel_futures=True)

    async def in_thread[Result](self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._text, function)

    def find(self, name: str) -> ServedModel:
        model = self.models.find(name)
        if model is None:
            raise APIError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return model

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Context of a request that generates. Raises `APIError` 503 while the server stops."""
        if self.is_draining or not self.scheduler.is_alive:
            raise APIError(503, "the server stops; try again later")
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        model, per_prompt = self.find(body.model), body.n or 1
        check_number(len(body.prompts) * per_prompt, self.config.max_queue, "prompt")
        limits = {"max_tokens": self.models.context_length, "vocab_size": self.models.vocab_size}
        prompts = await self.in_thread(lambda: [prompt_ids(model, prompt, **limits) for prompt in body.prompts])
        texts = None
        if body.echo:
            texts = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in body.prompts]
        options = {"logprobs": body.logprobs, "with_experts": bool(body.return_experts)}
        asked = Asked(
            model=model, prompts=prompts, per_prompt=per_prompt,
            max_new_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
            context_length=self.models.context_length, logprobs=body.logprobs,
            scores_prompts=bool(body.echo) and body.logprobs is not None,
            reply=CompletionReply(model.name, texts, per_prompt, **options),
        )  # fmt: skip
        return await self._answer(asked, body, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        model, per_prompt = self.find(body.model), body.n or 1
        check_number(per_prompt, self.config.max_queue, "n")
        limits = {"max_tokens": self.models.context_length, "vocab_size": self.models.vocab_size}
        ids = await self.in_thread(lambda: chat_ids(model, body.messages, **limits))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wanted = body.max_completion_tokens or body.max_tokens
        asked = Asked(
            model=model, prompts=[ids], per_prompt=per_prompt,
            max_new_tokens=self.models.context_length if wanted is None else wanted,
            context_length=self.models.context_length, logprobs=logprobs, scores_prompts=False,
            reply=ChatReply(model.name, logprobs=logprobs, with_experts=bool(body.return_experts)),
        )  # fmt: skip
        return await self._answer(asked, body, request)

    async def _answer(self, asked: Asked, body: GenerationRequest, request: Request) -> Response:
        context = contextlib.ExitStack()
        with context:
            context.enter_context(self.admitted())
            generation = Generation(asked, body, self.scheduler)
            context.callback(generation.close)
            if not body.stream:
                return await whole_or_gone(request, generation)
            return EventStream(generation.events(with_usage=body.includes_usage), context.pop_all().close)

    async def load_adapter(self, body: LoadAdapterRequest) -> None:
        reader = self._require_reader()
        name = body.lora_name
        if not NAME.fullmatch(name):
            raise invalid("lora_name: use letters, digits and . _ / : - only", "lora_name")
        directory = confined(body.lora_path, self.config.adapter_folders)
        async with self._adapters:
            if self.models.find(name) is not None:
                raise invalid(f"lora_name: {name} is loaded already; unload it first, or use another name", "lora_name")
            try:
                read = await self.in_thread(lambda: reader.read(name, str(directory)))
                await self.scheduler.call(lambda: self.models.add(read, now=int(time.time())))
            except UserError as error:
                raise invalid(str(error), "lora_path") from error

    async def unload_adapter(self, body: UnloadAdapterRequest) -> None:
        self._require_reader()
        async with self._adapters:
            if body.lora_name not in self.models.adapters:
                raise APIError(
                    404, f"no adapter {body.lora_name!r} is loaded", param="lora_name", code="model_not_found"
                )
            await self.scheduler.call(lambda: self.models.remove(body.lora_name))

    def _require_reader(self) -> AdapterReader:
        if not self.config.adapter_folders or self._reader is None:
            raise APIError(403, "adapters cannot be loaded or unloaded here; start the server with --adapter-folders")
        if self.is_draining or not self.scheduler.is_alive:
            raise APIError(503, "the server stops; try again later")
        return self._reader


def make_app(service: Service, *, key: str | None, only_loopback: bool) -> FastAPI:
    app = FastAPI(
        title="AdaFuse",
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TELEMETRY,
        responses=REFUSALS,
    )
    app.add_middleware(Gate, key=key, only_loopback=only_loopback)
    _add_handlers(app)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service, model) for model in service.models.all()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _card(service, service.find(name))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.completion(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        await service.load_adapter(body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        await service.unload_adapter(body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.get("/health")
    async def health() -> Response:
        if service.is_draining or not service.scheduler.is_alive:
            return JSONResponse({"status": "stopping"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return page.response()

    return app


def _card(service: Service, model: ServedModel) -> dict[str, Any]:
    base = service.models.base.name
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "adafuse"}
    parent = None if model.adapter is None else base
    return card | {"root": base, "parent": parent, "max_model_len": service.models.context_length}


def _add_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        response = APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        log.error(
            "%s failed: %s: %s (%s:%s)", request.url.path, type(error).__name__, error, frame.filename, frame.lineno
        )
        return APIError(500, "the server failed on this request; its log says why").response()
