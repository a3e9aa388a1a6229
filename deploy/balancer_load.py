"""Clients of two servers behind a balancer, and what became of each request."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from prove_load import QUESTIONS

CLIENTS, CONVERSATIONS = 12, 8
SYSTEM = "You are a patient assistant who answers in short and friendly sentences, and who never makes things up. "
LEFT = 0.04  # share of clients that hang up


@dataclass
class Call:
    """One request. Times are monotonic seconds; started: when the answer's headers came.

    outcome: whole; cut: it began and ended by an error; lost: failed without having begun; truncated: it began and
    ended without either; left: the client hung up.
    """

    conversation: int
    stream: bool
    began: float
    started: float | None = None
    ended: float = 0.0
    outcome: str = "truncated"
    detail: str = ""
    replica: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Load:
    """Clients that ask one question after the other, for as long as `going`."""

    url: str
    chance: random.Random
    going: bool = True
    calls: list[Call] = field(default_factory=list)

    async def run(self, during: Callable[[], None], seconds: float) -> float:
        """Ask for `seconds`, with `during` called at a third of them; then wait for what runs. Returns that moment."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as http:
            clients = [asyncio.ensure_future(self._client(http)) for _ in range(CLIENTS)]
            await asyncio.sleep(seconds / 3)
            moment = time.monotonic()
            during()
            await asyncio.sleep(2 * seconds / 3)
            self.going = False
            await asyncio.gather(*clients)
        return moment

    async def _client(self, http: httpx.AsyncClient) -> None:
        while self.going:
            call = Call(self.chance.randrange(CONVERSATIONS), self.chance.random() < 0.5, time.monotonic())
            self.calls.append(call)
            try:
                await self._ask(http, call, self.chance.random() < LEFT)
            except httpx.HTTPError as error:
                call.outcome, call.detail = "lost" if call.started is None else "cut", repr(error)
            call.ended = time.monotonic()

    async def _ask(self, http: httpx.AsyncClient, call: Call, leaves: bool) -> None:
        body = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"My name is Client {call.conversation}. {QUESTIONS[0]}"},
                {"role": "assistant", "content": "It is Paris."},
                {"role": "user", "content": self.chance.choice(QUESTIONS)},
            ],
            "max_tokens": self.chance.choice([8, 16, 32]),
            "temperature": self.chance.choice([0.0, 0.7]),
            "stream": call.stream,
        } | ({"stream_options": {"include_usage": True}} if call.stream else {})
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            call.replica = response.headers.get("X-Replica", "")
            if response.status_code != 200:
                await response.aread()
                call.outcome, call.detail = "lost", f"{response.status_code} {response.text[:200]}"
                return
            call.started = time.monotonic()
            if leaves:
                call.outcome = "left"
                return
            if call.stream:
                await _read_stream(response, call)
            else:
                _take_usage(json.loads(await response.aread()), call)
                call.outcome = "whole"


async def _read_stream(response: httpx.Response, call: Call) -> None:
    finished = False
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            if finished and not call.detail:
                call.outcome = "whole"
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            if "error" in event:
                call.outcome, call.detail = "cut", str(event["error"])
            else:
                finished |= any(choice.get("finish_reason") for choice in event["choices"])
                _take_usage(event, call)


def _take_usage(content: dict[str, Any], call: Call) -> None:
    if usage := content.get("usage"):
        call.prompt_tokens = usage["prompt_tokens"]
        call.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
