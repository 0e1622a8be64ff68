"""Errors of requests in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The first fault that pydantic finds in a body."""
    error = errors[0]
    place = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return invalid(f"the body is no JSON: {error['ctx']['error']} at character {place[-1] if place else 0}")
    if not place:
        advice = "send a JSON object, with Content-Type: application/json"
        return invalid(
            f"the body: {error['msg']}; {advice}" if error["type"] == "value_error" else f"the body: {advice}"
        )
    if error["type"] == "extra_forbidden":
        name = ".".join(place)
        return invalid(f"{name}: unknown parameter; leave it out", param=name, code="unknown_parameter")
    # A union reports each of its kinds, whose names are in the place.
    kinds = {tuple(error["loc"][:2]) for error in errors}
    name = place[0] if len(errors) > 1 and len(kinds) == 1 else ".".join(place)
    faults = dict.fromkeys(str(e["msg"]).removeprefix("Value error, ") for e in errors if tuple(e["loc"][:2]) in kinds)
    return invalid(f"{name}: {' or '.join([*faults][:3])}", param=name)
