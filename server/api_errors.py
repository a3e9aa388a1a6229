"""Errors as clients see them: one class per status, one JSON shape, and the handlers that map exceptions to both."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from linocut.engine.errors import EngineDead, EngineStopped, ParameterError

from .json_response import json_response

MESSAGE_LIMIT = 300  # an error never answers a hostile body with a larger one
ECHO_LIMIT = 100  # of which the client's own text


def clip(text: str, limit: int = ECHO_LIMIT) -> str:
    """`text`, at most `limit` characters of it, encodable as UTF-8."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return short.encode("utf-8", "replace").decode("utf-8")


class ApiError(Exception):
    """A refusal or failure with its HTTP status. `param` names what is to blame, dotted, as the client wrote it."""

    status = 500
    type = "InternalServerError"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        param = None if self.param is None else clip(self.param)
        return {
            "error": {"message": clip(str(self), MESSAGE_LIMIT), "type": self.type, "param": param, "code": self.code}
        }


class BadRequest(ApiError):
    status = 400
    type = "BadRequestError"


class Unauthorized(ApiError):
    status = 401
    type = "AuthenticationError"


class NotFound(ApiError):
    status = 404
    type = "NotFoundError"


class MethodNotAllowed(ApiError):
    status = 405
    type = "MethodNotAllowedError"


class RequestTimeout(ApiError):
    status = 408
    type = "RequestTimeoutError"


class PayloadTooLarge(ApiError):
    status = 413
    type = "PayloadTooLargeError"


class UnsupportedMediaType(ApiError):
    status = 415
    type = "UnsupportedMediaTypeError"


class TooManyRequests(ApiError):
    """A client's own limit; a full server is Unavailable."""

    status = 429
    type = "RateLimitError"


class InternalError(ApiError):
    pass


class Unavailable(ApiError):
    """Not now: the queue is full, the server drains, or the engine is gone."""

    status = 503
    type = "ServiceUnavailableError"


def as_api_error(error: Exception) -> ApiError:
    """The refusal that stands for any exception; what it does not know becomes a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ParameterError):
        return BadRequest(str(error), param=error.param, code=error.code)
    if isinstance(error, EngineStopped):
        return Unavailable("the server is shutting down", code="shutting_down")
    if isinstance(error, EngineDead):
        return Unavailable("the inference engine is not running", code="engine_dead")
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return NotFound("no such endpoint", code="unknown_url", headers=headers)
        if error.status_code == 405:
            return MethodNotAllowed("this endpoint does not answer to that method", headers=headers)
        refusal = ApiError(str(error.detail), headers=headers)
        refusal.status = error.status_code
        return refusal
    return InternalError("internal error; the server's log has the details")


def error_response(error: Exception) -> Response:
    refusal = as_api_error(error)
    return json_response(refusal.body(), refusal.status, refusal.headers)


def install_handlers(app: FastAPI) -> None:
    async def handle(_: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (ApiError, ParameterError, EngineDead, HTTPException):
        app.add_exception_handler(kind, handle)
