"""Streaming chat clients in processes of their own, so that they cost the server no time. They ask and count tokens."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from typing import Any
from urllib.parse import urlsplit

# Clients of a process; a stream is a few thousand events a second at most.
_CLIENTS = 32
_START_SECONDS = 120.0
_PATIENCE = 120.0


@dataclass(frozen=True)
class Streamed:
    """What the clients got. seconds: from the first request to the last answer. first_token_s: their median."""

    clients: int
    requests: int
    tokens: int
    seconds: float
    first_token_s: float
    processes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def run_streams(
    url: str, bodies: list[dict[str, Any]], clients: int, requests: int, path: str = "/v1/chat/completions"
) -> Streamed:
    """`requests` requests, `bodies` in turns, by `clients` clients that each ask again once they are answered.

    Raises RuntimeError if one is not answered.
    """
    context = multiprocessing.get_context("spawn")
    shares = [len(range(first, clients, -(-clients // _CLIENTS))) for first in range(-(-clients // _CLIENTS))]
    ticket = context.Value("q", 0)
    barrier = context.Barrier(len(shares))
    answers: Any = context.Queue()
    encoded = [json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}) for body in bodies]
    processes = [
        context.Process(target=_work, args=(url, path, encoded, share, requests, ticket, barrier, answers))
        for share in shares
    ]
    for process in processes:
        process.start()
    try:
        parts = [answers.get(timeout=600) for _ in processes]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    if faults := [part for part in parts if isinstance(part, str)]:
        raise RuntimeError(faults[0])
    asked = [one for part in parts for one in part]
    seconds = max(end for _, _, end, _ in asked) - min(start for start, _, _, _ in asked)
    firsts = statistics.median(first - start for start, first, _, _ in asked)
    return Streamed(clients, requests, sum(one[3] for one in asked), seconds, firsts, len(processes))


def _work(
    url: str, path: str, bodies: list[str], clients: int, requests: int, ticket: Any, barrier: Barrier, answers: Any
) -> None:
    try:
        barrier.wait(_START_SECONDS)
        answers.put(asyncio.run(_all(url, path, bodies, clients, requests, ticket)))
    except Exception as error:  # the parent waits for an answer, whatever it is
        answers.put(f"{type(error).__name__}: {error}")


async def _all(url: str, path: str, bodies: list[str], clients: int, requests: int, ticket: Any) -> list[Any]:
    parts = await asyncio.gather(*(_client(url, path, bodies, requests, ticket) for _ in range(clients)))
    return [one for part in parts for one in part]


async def _client(
    url: str, path: str, bodies: list[str], requests: int, ticket: Any
) -> list[tuple[float, float, float, int]]:
    """Seconds of the monotonic clock, which all processes share, at the start, the first text and the end; tokens."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
    asked = []
    try:
        while True:
            with ticket.get_lock():
                number = ticket.value
                ticket.value += 1
            if number >= requests:
                return asked
            body = bodies[number % len(bodies)].encode()
            head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
            start = time.monotonic()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            first, tokens = await asyncio.wait_for(_answer(reader), _PATIENCE)
            asked.append((start, first, time.monotonic(), tokens))
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[float, int]:
    """When the first text came, and the tokens that the last event counts. Raises RuntimeError."""
    status = await reader.readline()
    chunked, length = False, 0
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.lower().partition(b":")
        chunked = chunked or (name == b"transfer-encoding" and b"chunked" in value)
        length = int(value) if name == b"content-length" else length
    if not status.startswith(b"HTTP/1.1 200") or not chunked:
        body = await reader.readexactly(length)
        raise RuntimeError(f"the server answered {(status.strip() + b': ' + body[:300]).decode(errors='replace')}")
    first: float | None = None
    tokens: int | None = None
    rest = b""
    while size := int(await reader.readline(), 16):
        rest += await reader.readexactly(size)
        await reader.readline()
        *events, rest = rest.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: ") or event == b"data: [DONE]":
                continue
            # Reading every event would cost more than counting them has to.
            if first is not None and b'"usage":null' in event:
                continue
            found = json.loads(event[6:])
            if "error" in found:
                raise RuntimeError(str(found["error"])[:300])
            if first is None and any(choice["delta"].get("content") for choice in found["choices"]):
                first = time.monotonic()
            if found.get("usage"):
                tokens = found["usage"]["completion_tokens"]
    await reader.readline()
    if tokens is None:
        raise RuntimeError("the stream ended early")
    return first or time.monotonic(), tokens
