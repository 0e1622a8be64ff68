"""Errors of requests in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from starlette.responses import JSONResponse

from adafuse_jax.core.errors import MAX_MESSAGE, shortened

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""Status → type; other 4xx are invalid_request_error."""
OWN = "Value error, "
"""The words that pydantic puts before the message of a validator of our own."""
UNIONS = {
    "prompt": "it must be a text, a list of texts, a list of token ids, or a list of such lists; none may be empty",
    "stop": "it must be a text or a list of at most 16 texts, each of 1 to 256 characters",
    "content": "it must be a text or a list of text parts",
}
"""Parameter of several kinds → the kinds."""


class APIError(Exception):
    """A request that is refused, or has failed: its status, message, and the parameter at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, shortened(message, MAX_MESSAGE), param, code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def queue_full(places: int) -> APIError:
    return APIError(429, f"the queue of {places} rows is full; try again later", code="queue_full")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first fault that pydantic finds in a body; of a union, of which each kind has a fault, that of them all."""
    error = errors[0]
    same = [e for e in errors if e["loc"][:2] == error["loc"][:2]]
    columns = zip(*(e["loc"] for e in same), strict=False)  # by depth
    place = [str(parts[0]) for parts in takewhile(lambda parts: len({*parts}) == 1, columns)][1:]
    name = ".".join(place)
    own = next((str(e["msg"]).removeprefix(OWN) for e in same if e["type"] == "value_error"), None)
    if error["type"] == "json_invalid":
        return invalid(f"the body is no JSON: {error['ctx']['error']} at character {name or 0}")
    if not place:  # the validators of a whole body begin with the parameter's name
        advice = "the body: send a JSON object, with Content-Type: application/json"
        return invalid(own or advice, own.split()[0] if own else None)
    if error["type"] == "extra_forbidden":
        return invalid(f"{name}: unknown parameter; leave it out", name, "unknown_parameter")
    if own is None and len(same) > 1 and place[-1] in UNIONS:
        own = UNIONS[place[-1]]
    return invalid(f"{name}: {own or without_jargon(error['msg'])}", name)


def without_jargon(message: str) -> str:
    """A message of pydantic, without the words that it has for developers."""
    message = message.replace(" after validation", "")
    for words in ("Input should", "List should", "String should", "Value should"):
        message = message.replace(words, "it must")
    return message[:1].lower() + message[1:]
