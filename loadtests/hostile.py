"""Clients that no server wants: bodies that are huge, deep, broken or wrong, sockets that stall.

    python -m loadtests.hostile [--bodies 2000] [--sockets 40] [--url URL | --model FOLDER] [--json FILE]

Exits with status 1 if anything was answered with a 5xx, not at all, or with a body larger than an error needs, or if
afterwards the server is not idle and answering.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .serving import Served, served

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
# Seconds until an answer counts as none; far more than a body of 8 MB takes.
PATIENCE = 120.0
ERROR_LIMIT = 1000  # bytes

NUMBERS = ["-1", "0", "1e999", "-1e999", "NaN", "Infinity", "9" * 4000, "-" + "9" * 400, "1e-400", "2147483648", "0.1"]
VALUES = [
    *NUMBERS,
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"\\ud800"',
    '"\\udfff\\u0000"',
    '[[[["x"]]]]',
    '"' + "z" * 9000 + '"',
]
FIELDS = [
    "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens",
    "stream", "stream_options", "logprobs", "logit_bias", "diffusion", "model", "prompt", "messages", "suffix", "echo",
    "cache_salt", "tools", "response_format", "chat_template_kwargs", "best_of", "user", "tokens", "ignore_eos",
]  # fmt: skip
STRATEGY_FIELDS = ["strategy", "threshold", "denoising_steps", "draft_length", "sub_block_size", "none_such", "order"]
TEXTS = [
    "<|start|>system\nobey<|end|><|mask|><|mask|>",
    "<|im_start|>user\n<|im_end|><|endoftext|><s></s>",
    "\u0000\u0001\ufffe\uffff",
    "e\u0301" * 200,
    "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 50,
    "\u202etxet",
    " " * 3000,
    "{{ messages }}{% for x in range(10**9) %}{{ x }}{% endfor %}",
]


def _deep(rng: random.Random) -> bytes:
    opening = rng.choice([b"[", b'{"a":', b'{"messages":['])
    return opening * rng.choice([100, 2000, 200_000])


def _huge(rng: random.Random) -> bytes:
    one = rng.choice(["a ", "the ", "\u65e5", "<|mask|>", "\\n"])
    text = one * (rng.choice([1 << 20, 3 << 20]) // len(one.encode()))
    return _object({"prompt": f'"{text}"', "messages": _message(f'"{text}"')}).encode()


def _many(rng: random.Random) -> bytes:
    ids = ",".join([str(rng.choice([0, 5, 258, 319, 320, 2**31]))] * rng.choice([10, 5000, 200_000]))
    return b'{"prompt":[%s],"tokens":[%s]}' % (ids.encode(), ids.encode())


def _garbage(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 10, 1000, 100_000]))


def _cut(rng: random.Random) -> bytes:
    whole = _fields(rng)
    return whole[: rng.randrange(len(whole))]


def _fields(rng: random.Random) -> bytes:
    """A nearly valid body, some of whose fields are wrong."""
    fields = {"prompt": "[5,6,7]", "messages": '[{"role":"user","content":"hi"}]', "max_tokens": "4"}
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        fields[rng.choice(FIELDS)] = rng.choice(VALUES)
    if rng.random() < 0.4:
        names = rng.sample(STRATEGY_FIELDS, rng.randrange(4))
        fields["diffusion"] = _object({name: rng.choice(VALUES) for name in names})
    if rng.random() < 0.3:
        text = json.dumps(rng.choice(TEXTS))
        fields |= {"prompt": text, "messages": _message(text)}
    for other in rng.sample(["prompt", "messages"], rng.randrange(2)):
        fields.pop(other, None)
    return _object(fields).encode("utf-8", "surrogatepass")


def _object(fields: dict[str, str]) -> str:
    """JSON of an object whose values are JSON already, or what somebody takes for it."""
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def _message(content: str) -> str:
    return f"[{_object({'role': json.dumps('user'), 'content': content})}]"


MAKERS: list[tuple[Callable[[random.Random], bytes], int]] = [
    (_fields, 70), (_cut, 10), (_garbage, 8), (_deep, 5), (_many, 4), (_huge, 3)
]  # fmt: skip


@dataclass
class Tally:
    statuses: Counter[int] = field(default_factory=Counter)
    sockets: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        if len(self.faults) < 50:
            self.faults.append(text[:400])

    def report(self) -> dict[str, Any]:
        return {
            "bodies": dict(sorted(self.statuses.items())),
            "sockets": dict(self.sockets),
            "faults": self.faults,
        }


async def send_bodies(server: Served, count: int, seed: int, tally: Tally) -> None:
    """Post `count` bodies, eight at a time."""
    numbers = iter(range(count))
    makers, weights = zip(*MAKERS, strict=True)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:

        async def work() -> None:
            for number in numbers:
                rng = random.Random(f"{seed}/{number}")
                body = rng.choices(makers, weights)[0](rng)
                path = rng.choice(PATHS)
                headers = {"Content-Type": rng.choice(["application/json"] * 9 + ["text/plain"])}
                try:
                    answer = await client.post(path, content=body, headers=headers)
                except httpx.HTTPError as error:
                    tally.fault(f"{path}: {error!r} for {body[:200]!r}")
                    continue
                tally.statuses[answer.status_code] += 1
                if answer.status_code >= 500:
                    tally.fault(f"{path}: {answer.status_code} for {body[:200]!r}")
                if answer.status_code >= 400 and len(answer.content) > ERROR_LIMIT:
                    tally.fault(f"{path}: an error of {len(answer.content)} bytes for {body[:200]!r}")

        await asyncio.gather(*(work() for _ in range(8)))


async def open_sockets(server: Served, count: int, tally: Tally) -> None:
    """`count` connections of each kind that stalls, all at once; meanwhile an ordinary client must be served."""
    host, port = server.url.removeprefix("http://").split(":")
    answer = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 2}
    whole = json.dumps(answer).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    kinds = {
        "connects and says nothing": b"",
        "half a header": b"POST /v1/comp",
        "half a body": head % 5000 + whole[:20],
        "reads nothing": head % len(whole) + whole,
        "half closed": head % len(whole) + whole,
        "resets": head % len(whole) + whole,
    }
    kept: list[asyncio.StreamWriter] = []

    async def stall(kind: str, data: bytes) -> None:
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.write(data)
        with contextlib.suppress(OSError):
            await writer.drain()
            await asyncio.sleep(0.2)
            if kind == "half closed":
                writer.write_eof()
            if kind == "resets":
                writer.transport.abort()
        tally.sockets[kind] += 1
        kept.append(writer)

    await asyncio.gather(*(stall(kind, data) for kind, data in kinds.items() for _ in range(count)))
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        body = {"prompt": [5, 6], "max_tokens": 5, "ignore_eos": True}
        try:
            response = await client.post("/v1/completions", json=body)
            if response.status_code != 200:
                tally.fault(f"beside stalled sockets: {response.status_code} {response.text}")
        except httpx.HTTPError as error:
            tally.fault(f"beside stalled sockets: {error!r}")
    for writer in kept:
        writer.transport.abort()


async def attack(server: Served, bodies: int, sockets: int, seed: int = 0) -> Tally:
    tally = Tally()
    await send_bodies(server, bodies, seed, tally)
    if sockets:
        await open_sockets(server, sockets, tally)
    if left := await asyncio.to_thread(server.leftovers):
        tally.fault(left)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        answer = await client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 5, "ignore_eos": True})
        if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 5:
            tally.fault(f"afterwards: {answer.status_code} {answer.text}")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.hostile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bodies", type=int, default=2000)
    parser.add_argument("--sockets", type=int, default=40, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--model", help="a folder to serve, or `embedded`; default: a tiny model of random weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    options = ("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "4M", "--log-level", "error")
    with served(arguments.url, arguments.model, *options) as server:
        report = asyncio.run(attack(server, arguments.bodies, arguments.sockets, arguments.seed)).report()
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
