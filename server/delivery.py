"""Answers on their way to the client: as one JSON body or as server-sent events, ended early if the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from .answer import Delta
from .api_errors import as_api_error, error_response
from .generation import Generation
from .json_response import encode, json_response
from .metrics import Metrics

T = TypeVar("T")


class Format(Protocol):
    """How one endpoint writes answers. It sees every delta once, in order."""

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """Streaming: the events of a delta; none if nothing in it can be shown yet."""

    def usage_chunk(self) -> dict[str, Any] | None:
        """Streaming: the event after the last choice has ended, if the client asked for it."""

    def add(self, delta: Delta) -> None:
        """Not streaming: remember a delta."""

    def body(self) -> dict[str, Any]:
        """Not streaming: the whole answer."""


class Call:
    """What the log says of a generating call when it has ended."""

    def __init__(self, request: Request, generation: Generation, metrics: Metrics) -> None:
        self._notes: dict[str, object] = request.scope.setdefault("linocut.notes", {})
        self._generation = generation
        self._metrics = metrics

    def end(self, failure: BaseException | None = None) -> None:
        generation = self._generation
        generation.close()
        seconds = time.monotonic() - generation.started
        if failure is None:
            self._metrics.ended(seconds)
        elif isinstance(failure, (ClientDisconnect, asyncio.CancelledError)):
            self._metrics.disconnected()
        else:
            self._metrics.failed(as_api_error(failure).type if isinstance(failure, Exception) else "other")
        first = generation.first_text
        self._notes |= {
            "finish": ",".join(str(answer.finish_reason) for answer in generation.answers[:8]),
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "forwards": sum(answer.forwards for answer in generation.answers),
            "first_s": None if first is None else round(first - generation.started, 3),
        }
        if failure is not None:
            self._notes["failure"] = type(failure).__name__


async def deliver(
    request: Request, generation: Generation, form: Format, metrics: Metrics, stream: bool, keep_alive: float
) -> Response:
    """The response of a generating call. The generation is closed when it is done, whatever happens."""
    call = Call(request, generation, metrics)
    if stream:
        return EventStream(generation, form, call, keep_alive)
    try:
        body = await _unless_disconnected(request.receive, _collect(generation, form))
    except BaseException as error:
        call.end(error)
        raise
    call.end()
    return json_response(body)


async def _collect(generation: Generation, form: Format) -> dict[str, Any]:
    while not generation.finished:
        for delta in await generation.advance():
            form.add(delta)
    return form.body()


class EventStream(Response):
    """Server-sent events of one generation; a comment after `keep_alive` seconds of silence.

    The status goes out with the first event. What fails before is answered with a status of its own, and a balancer may
    still ask another server.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, form: Format, call: Call, keep_alive: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._format = form
        self._call = call
        self._keep_alive = keep_alive
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: BaseException | None = None
        try:
            failure = await _unless_disconnected(receive, self._run(send))
            if failure is not None and not self._started:
                await error_response(failure)(scope, receive, send)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._call.end(failure)

    async def _run(self, send: Send) -> Exception | None:
        """Send all events; what fails is returned, and is an event if it is not the first."""
        failure: Exception | None = None
        try:
            await self._send_deltas(send)
        except Exception as error:
            failure = error
            if not self._started:
                return failure
            await self._send(send, _event(as_api_error(error).body()))
        await self._send(send, b"data: [DONE]\n\n", more=False)
        return failure

    async def _send_deltas(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        sent = loop.time()
        while not self._generation.finished:
            deltas = await self._generation.advance(timeout=max(sent + self._keep_alive - loop.time(), 0.0))
            events = b"".join(_event(chunk) for delta in deltas for chunk in self._format.chunks(delta))
            if events:
                await self._send(send, events)
            elif loop.time() - sent >= self._keep_alive:
                await self._send(send, b": keep-alive\n\n")
            else:
                continue
            sent = loop.time()
        usage = self._format.usage_chunk()
        if usage is not None:
            await self._send(send, _event(usage))

    async def _send(self, send: Send, piece: bytes, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": piece, "more_body": more})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + encode(content) + b"\n\n"


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client leaves first, `work` is cancelled and ClientDisconnect raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
