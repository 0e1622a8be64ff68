"""The application: OpenAI's endpoints, vLLM's for adapters, health, metrics and the page."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from adafuse_jax.serving import page
from adafuse_jax.serving.errors import APIError, of_validation
from adafuse_jax.serving.models import ServedModel
from adafuse_jax.serving.protocol import ChatRequest, CompletionRequest, LoadAdapterRequest, UnloadAdapterRequest
from adafuse_jax.serving.security import Gate
from adafuse_jax.serving.service import Service

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


def make_app(service: Service, *, key: str | None, only_loopback: bool) -> FastAPI:
    app = FastAPI(
        title="AdaFuse",
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TELEMETRY,
        responses=REFUSALS,
    )
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
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
        if not service.is_serving:
            return JSONResponse({"status": "stopping"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return page.response()

    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI adds: what it refuses gets 400 here."""
    document = app.openapi_schema = app.openapi_schema or get_openapi(
        title=app.title, version=app.version, routes=app.routes
    )
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return document


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
