"""Around every request: its id, the API key, the log line, the HTTP metrics, and an answer whatever happens inside."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_errors import ApiError, error_response
from .operations import PROBES
from .service import Service

log = logging.getLogger("linocut.requests")

_DISCONNECTED = 499  # nginx's status for a client that left; only logged and counted


class Gateway:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _sane_id(headers.get(b"x-request-id")) or secrets.token_hex(12)
        began = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        probe = scope["path"] in PROBES
        self._service.active += not probe
        try:
            if self._service.keys.guards(scope["path"]):
                self._service.keys.check(headers.get(b"authorization"))
            await self._app(scope, receive, send_with_id)
        except ApiError as refusal:
            await error_response(refusal)(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _DISCONNECTED
        except Exception as error:
            log.exception("request %s failed", request_id)
            if status == 0:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            self._service.active -= not probe
            endpoint = getattr(scope.get("route"), "path", "other")
            notes = scope.get("linocut.notes", {})
            if notes.get("failure") == ClientDisconnect.__name__:
                status = _DISCONNECTED
            self._service.metrics.answered(endpoint, _known_method(scope["method"]), status)
            details = "".join(f" {name}={value}" for name, value in notes.items())
            level = logging.DEBUG if probe else logging.INFO
            seconds = time.monotonic() - began
            log.log(level, "%s %s status=%d seconds=%.3f%s", request_id, endpoint, status, seconds, details)


def _sane_id(value: bytes | None) -> str | None:
    if value is None or not 1 <= len(value) <= 128 or not all(33 <= byte <= 126 for byte in value):
        return None
    return value.decode("ascii")


def _known_method(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
