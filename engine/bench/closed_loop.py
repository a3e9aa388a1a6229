"""Clients that each ask again as soon as they are answered: a steady number of prompts in an engine of this process."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from ..core import EngineCore
from ..messages import AddRequest
from ..params import DecodingParams, SamplingParams
from .collector import settled


@dataclass(frozen=True)
class ClosedLoop:
    """What the clients got. seconds: from the first request to the last answer. first_token_s: median of the requests.

    forwards: summed over the requests.
    """

    clients: int
    requests: int
    tokens: int
    seconds: float
    first_token_s: float
    forwards: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def run_clients(
    core: EngineCore, decoding: DecodingParams, prompts: list[list[int]], clients: int, requests: int, tokens: int
) -> ClosedLoop:
    """`requests` prompts, taken in turns from `prompts`, at most `clients` at a time, greedy, each to its end or for
    `tokens` tokens. Raises RuntimeError if one fails."""
    with settled():
        return _answers(core, decoding, prompts, clients, requests, tokens)


def _answers(
    core: EngineCore, decoding: DecodingParams, prompts: list[list[int]], clients: int, requests: int, tokens: int
) -> ClosedLoop:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
    asked: dict[str, float] = {}
    firsts: dict[str, float] = {}
    total = forwards = running = 0
    began = time.perf_counter()
    while running or len(asked) < requests:
        while running < clients and len(asked) < requests:
            name = str(len(asked))
            prompt = prompts[len(asked) % len(prompts)]
            asked[name] = time.perf_counter()
            core.add(AddRequest(request_id=name, prompt=prompt, sampling=sampling, decoding=decoding))
            running += 1
        for output in core.step():
            if output.token_ids:
                firsts.setdefault(output.request_id, time.perf_counter())
            total += len(output.token_ids)
            if output.finish_reason:
                if output.finish_reason == "error":
                    raise RuntimeError(f"a request failed: {output.error}")
                running -= 1
                forwards += output.forwards
    seconds = time.perf_counter() - began
    waited = [firsts[name] - asked[name] for name in firsts]
    return ClosedLoop(clients, requests, total, seconds, statistics.median(waited), forwards)
