"""Many requests with random parameters, some of them cut off, some invalid; then a look at what they left behind.

    python -m loadtests.soak [--requests 10000] [--clients 32] [--url URL | --model FOLDER] [--json FILE]

Exits with status 1 unless afterwards all pages are free or cached, nothing runs, memory is flat (of a server that this
command has started) and every answered request was whole: every choice ended, with all the tokens that usage says, in
order, and probes with a fixed seed always got the same text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .serving import Served, served

PROBE = {
    "prompt": [5, 17, 101, 44],
    "max_tokens": 24,
    "temperature": 1.0,
    "seed": 11,
    "ignore_eos": True,
    "return_token_ids": True,
}
# Growth of memory over the second half that still counts as flat, and the least requests that say anything of it:
# every new shape of a forward leaves a compiled primitive in oneDNN's cache, which holds a thousand of them.
FLAT_BYTES = 32 << 20
FLAT_REQUESTS = 4000


@dataclass
class Tally:
    """What happened. faults: what must not happen, the first of them in words."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    probes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def fault(self, text: str) -> None:
        self.outcomes["fault"] += 1
        if len(self.faults) < 20:
            self.faults.append(text[:500])

    def report(self) -> dict[str, Any]:
        return {**asdict(self), "outcomes": dict(self.outcomes), "probes": len(self.probes)}


def random_body(rng: random.Random, strategies: list[str]) -> dict[str, Any]:
    """A valid completion request on token ids."""
    shared = [9] * 64 if rng.random() < 0.3 else []
    body: dict[str, Any] = {
        "prompt": shared + [rng.randrange(8, 250) for _ in range(rng.choice([1, 5, 30, 30, 120, 300]))],
        "max_tokens": rng.choice([1, 3, 8, 20, 20, 60, 150]),
        "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
        "ignore_eos": rng.random() < 0.7,
        "stream": rng.random() < 0.5,
        "n": rng.choice([1, 1, 1, 1, 2, 4]),
        "return_token_ids": True,
    }
    choices = {
        "top_p": lambda: rng.uniform(0.05, 1.0),
        "top_k": lambda: rng.choice([-1, 1, 5, 50]),
        "min_p": lambda: rng.uniform(0.0, 0.5),
        "seed": lambda: rng.randrange(2**40),
        "min_tokens": lambda: rng.randrange(0, body["max_tokens"] + 1),
        "stop_token_ids": lambda: [rng.randrange(8, 250) for _ in range(3)],
        "cache_salt": lambda: rng.choice("ab"),
        "diffusion": lambda: {"strategy": rng.choice(strategies)},
    }
    for name, draw in choices.items():
        if rng.random() < 0.25:
            body[name] = draw()
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    return body


def break_body(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """`body` with something that has to be refused."""
    wrong = rng.choice(
        [
            {"prompt": []},
            {"prompt": [10**6]},
            {"prompt": [5] * 100_000},
            {"temperature": -1},
            {"max_tokens": 0},
            {"n": 10**6},
            {"diffusion": {"strategy": "none-such"}},
            {"logit_bias": {"5": "x"}},
            {"stop_token_ids": "abc"},
        ]
    )
    return {**body, **wrong}


async def soak(server: Served, requests: int, clients: int, seed: int = 0) -> Tally:
    """Run `requests` requests, `clients` at a time, and look at what is left."""
    tally = Tally()
    card = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"][0]
    strategies = card["diffusion"]["strategies"]
    began = time.monotonic()
    numbers = iter(range(requests))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

        async def work() -> None:
            for number in numbers:
                rng = random.Random(f"{seed}/{number}")
                if number % max(requests // 10, 1) == 0:
                    tally.memory.append(server.memory())
                    print(f"{number:>7} requests, {tally.memory[-1] >> 20} MiB", file=sys.stderr, flush=True)
                try:
                    await _one(client, rng, strategies, tally)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    tally.fault(f"request {number}: {error!r}")

        await asyncio.gather(*(work() for _ in range(clients)))
    tally.seconds = round(time.monotonic() - began, 1)
    if left := server.leftovers():
        tally.fault(left)
    tally.memory.append(server.memory())
    grown = tally.memory[-1] - tally.memory[len(tally.memory) // 2]
    if requests >= FLAT_REQUESTS and grown > FLAT_BYTES:
        tally.fault(f"memory grew by {grown >> 20} MiB")
    if len(tally.probes) > 1:
        tally.fault(f"one seed, {len(tally.probes)} texts")
    return tally


async def _one(client: httpx.AsyncClient, rng: random.Random, strategies: list[str], tally: Tally) -> None:
    kind = rng.choices(["ask", "hang up", "invalid", "probe"], [60, 25, 10, 5])[0]
    body = dict(PROBE) if kind == "probe" else random_body(rng, strategies)
    if kind == "invalid":
        answer = await client.post("/v1/completions", json=break_body(rng, body))
        tally.outcomes[f"refused {answer.status_code}"] += 1
        if not 400 <= answer.status_code < 500:
            tally.fault(f"{answer.status_code} where 4xx is due: {answer.text}")
        return
    if kind == "hang up":
        try:
            async with asyncio.timeout(rng.choice([0.005, 0.05, 0.2, 0.5])):
                await _ask(client, body, tally)
        except TimeoutError:
            tally.outcomes["hung up"] += 1
        return
    tokens = await _ask(client, body, tally)
    if kind == "probe" and tokens is not None:
        tally.probes[tuple(tokens)] += 1


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], tally: Tally) -> list[int] | None:
    """The first choice's tokens if the request was answered; notes a fault if the answer is not whole."""
    n = body.get("n", 1)
    tokens: dict[int, list[int]] = {index: [] for index in range(n)}
    ends: dict[int, str] = {}
    usage: dict[str, Any] = {}
    if body.get("stream"):
        done = False
        async with client.stream("POST", "/v1/completions", json=body) as response:
            status, text = response.status_code, ""
            async for line in response.aiter_lines():
                if status != 200:
                    text += line
                elif line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    _take(json.loads(line[6:]), tokens, ends, usage)
        if status == 200 and not done:
            tally.fault("a stream ended without [DONE]")
            return None
    else:
        response = await client.post("/v1/completions", json=body)
        status, text = response.status_code, response.text
        if status == 200:
            _take(response.json(), tokens, ends, usage)
    if status == 503 and "queue_full" in text:
        tally.outcomes["queue full"] += 1
        return None
    if status == 400 and ("diffusion" in body or "context_length_exceeded" in text):
        # Not every strategy takes every parameter, nor every model every length; the refusal says so.
        tally.outcomes["refused 400"] += 1
        return None
    if status != 200:
        tally.fault(f"{status}: {text} for {json.dumps(body)[:200]}")
        return None
    tally.outcomes["answered"] += 1
    count = sum(map(len, tokens.values()))
    tally.tokens += count
    whole = len(ends) == n and count == usage.get("completion_tokens")
    if body.get("ignore_eos") and not body.get("stop_token_ids"):
        whole = whole and all(len(one) == body["max_tokens"] for one in tokens.values())
    if not whole:
        lengths = [len(one) for one in tokens.values()]
        tally.fault(f"not whole: {lengths} tokens, ends {ends}, usage {usage}, body {json.dumps(body)[:200]}")
    return tokens[0]


def _take(message: dict[str, Any], tokens: dict[int, list[int]], ends: dict[int, str], usage: dict[str, Any]) -> None:
    if "error" in message:
        raise ValueError(str(message["error"]))
    for choice in message["choices"]:
        tokens[choice["index"]] += choice.get("token_ids") or []
        if choice.get("finish_reason"):
            ends[choice["index"]] = choice["finish_reason"]
    usage |= message.get("usage") or {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a running server; memory is not looked at")
    parser.add_argument("--model", help="a folder to serve, or `embedded`; default: a tiny model of random weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    # Few pages, so that preemption is part of it.
    options = ("--dtype", "float32", "--max-model-len", "1024", "--kv-memory", "1500K", "--log-level", "warning")
    with served(arguments.url, arguments.model, *options) as server:
        tally = asyncio.run(soak(server, arguments.requests, arguments.clients, arguments.seed))
        counters = server.metrics()
        report = tally.report() | {
            "preemptions": counters["linocut_num_preemptions_total"],
            "disconnects": counters["linocut_client_disconnects_total"],
        }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
