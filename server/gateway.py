"""Around every request: its id, the API key, the log line, the HTTP metrics, and an answer whatever happens inside."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_errors import ApiError, TooManyRequests, clip, error_response
from .auth import Caller
from .logs import log_event
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
        began, began_ns = time.monotonic(), time.time_ns()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["X-Request-Id"] = request_id
                if self._service.leaving:
                    # The client's next request had better go elsewhere.
                    answered["Connection"] = "close"
            await send(message)

        probe = scope["path"] in PROBES
        self._service.active += not probe
        caller: Caller | None = None
        entered = False
        try:
            if self._service.keys.guards(scope["path"]):
                caller = self._service.keys.check(headers.get(b"authorization"))
                caller.quota.enter()
                entered = True
            await self._app(scope, receive, send_with_id)
        except ApiError as refusal:
            if isinstance(refusal, TooManyRequests):
                self._service.metrics.rate_limited()
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
            if caller is not None and entered:
                caller.quota.leave(notes.get("prompt_tokens", 0) + notes.get("completion_tokens", 0))
            method = _known_method(scope["method"])
            self._service.metrics.answered(endpoint, method, status)
            seconds = time.monotonic() - began
            fields = {
                "status": status,
                "seconds": round(seconds, 3),
                "client": (scope.get("client") or ("unknown",))[0],
                "key": None if caller is None else caller.name,
                **notes,
            }
            text = "".join(f" {name}={value}" for name, value in fields.items() if value is not None)
            fields |= {"request_id": request_id, "method": method, "endpoint": endpoint, "path": clip(scope["path"])}
            level = logging.DEBUG if probe else logging.INFO
            log_event(log, level, "request", f"{request_id} {method} {endpoint}{text}", fields)
            if not probe:
                self._service.tracer.request(headers, began_ns, fields)


def _sane_id(value: bytes | None) -> str | None:
    if value is None or not 1 <= len(value) <= 128 or not all(33 <= byte <= 126 for byte in value):
        return None
    return value.decode("ascii")


def _known_method(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
