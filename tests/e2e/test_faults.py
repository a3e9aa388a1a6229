"""Clients that hang up, an engine that is killed, an operator who stops the server."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from .conftest import GOLDEN, Server, start, stop

SDAR = [str(GOLDEN / "sdar"), "--dtype", "float32", "--max-model-len", "2048"]
PROMPT = [5, 17, 101, 44, 9, 260, 33, 7]


def request(tokens: int, length: int = 8) -> dict[str, object]:
    prompt = [(7 * i + 3) % 300 for i in range(length)]
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True, "stream": True}


async def hang_up(client: httpx.AsyncClient, url: str, rng: random.Random) -> int:
    """Send a request and drop the connection at a random moment; returns 1 if the answer came first."""
    body = request(rng.choice([4, 200, 1200]), rng.choice([1, 40, 700]))
    body["stream"] = rng.random() < 0.7
    try:
        async with asyncio.timeout(rng.choice([0.02, 0.3, 1.0, 3.0])):
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    pass
        return 1
    except (TimeoutError, httpx.TransportError):
        return 0


def test_200_clients_that_hang_up_leave_nothing_behind(sdar: Server) -> None:
    async def crowd() -> int:
        rng = random.Random(3)
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            return sum(await asyncio.gather(*(hang_up(client, sdar.url, rng) for _ in range(200))))

    answered = asyncio.run(crowd())
    assert answered < 200, "nobody hung up: the test tests nothing"
    sdar.wait_for("linocut_num_requests_running == 0")
    sdar.wait_for("linocut_num_requests_waiting == 0")
    free, cached = sdar.metric("linocut_kv_pages_free"), sdar.metric("linocut_kv_pages_cached")
    assert free + cached == sdar.metric("linocut_kv_pages")
    answer = httpx.post(
        f"{sdar.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 9, "ignore_eos": True}, timeout=60
    )
    assert answer.json()["usage"]["completion_tokens"] == 9


def test_a_killed_engine_fails_its_requests_and_the_server(sdar: Server) -> None:
    async def load() -> list[str]:
        async def one() -> str:
            seen = ""
            try:
                async with client.stream("POST", f"{sdar.url}/v1/completions", json=request(1500)) as response:
                    async for line in response.aiter_lines():
                        seen = line or seen
                        if "error" in line:
                            return "error event"
                    return f"ended with {seen!r}" if response.status_code == 200 else f"status {response.status_code}"
            except httpx.TransportError as error:
                return f"transport: {error!r}"

        async with httpx.AsyncClient(timeout=60) as client:
            tasks = [asyncio.create_task(one()) for _ in range(8)]
            await asyncio.sleep(2.0)
            sdar.engine_process().kill()
            results = await asyncio.gather(*tasks)
            return list(results)

    outcomes = asyncio.run(load())
    assert all(outcome in ("error event", "status 500", "status 503") for outcome in outcomes), outcomes
    assert sdar.process.wait(timeout=60) != 0


def test_an_engine_that_hangs_is_noticed_and_ended(tmp_path: Path) -> None:
    """It cannot be asked where it is: it was stopped. Five times the patience are for kernels to be compiled."""
    server = start([*SDAR, "--stall-seconds", "1"], tmp_path / "log")
    engine = server.engine_process()
    with ThreadPoolExecutor(1) as pool:
        body = {**request(1500), "stream": False}
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        server.wait_for("linocut_num_requests_running == 1")
        engine.suspend()
        stopped = time.monotonic()
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "engine_dead"
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert server.process.wait(timeout=60) == 1
    assert time.monotonic() - stopped < 30
    assert not engine.is_running()
    assert "no step in" in server.log.read_text()


def test_the_log_says_where_a_busy_engine_hangs(sdar: Server) -> None:
    sdar.engine_process().send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while "engine/process.py" not in sdar.log.read_text():
        assert time.monotonic() < deadline, sdar.log.read_text()
        time.sleep(0.1)
    assert httpx.get(f"{sdar.url}/ready").status_code == 200


def test_sigterm_finishes_what_runs(sdar: Server) -> None:
    async def talk() -> tuple[int, int]:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {**request(300), "stream": False}
            running = asyncio.create_task(client.post(f"{sdar.url}/v1/completions", json=body))
            await asyncio.sleep(1.0)
            status = await asyncio.to_thread(stop, sdar)
            answer = await running
            return status, answer.json()["usage"]["completion_tokens"]

    assert asyncio.run(talk()) == (0, 300)
