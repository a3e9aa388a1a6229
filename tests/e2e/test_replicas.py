"""Two real engines behind one server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from .conftest import GOLDEN, Server, start, stop

SDAR = [str(GOLDEN / "sdar"), "--dtype", "float32", "--device", "cpu", "--max-model-len", "2048"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Server]:
    server = start([*SDAR, "--replicas", "2", "--kv-memory", "64M"], tmp_path / "log")
    yield server
    if server.process.poll() is None:
        stop(server)


def by_engine(server: Server, name: str) -> list[float]:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return [float(value) for value in re.findall(rf'^{name}{{engine="\d"[^}}]*}} (\S+)$', text, re.MULTILINE)]


def engines(server: Server) -> list[psutil.Process]:
    """The children that hold a model."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return sorted(children, key=lambda child: child.memory_info().rss)[-2:]


def ask(server: Server, prompt: list[int], tokens: int = 16) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=200)


def tokens_of(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def test_both_engines_work_and_give_the_same_text(pair: Server) -> None:
    prompt = [5, 17, 101, 44, 9, 260, 33, 7]
    with ThreadPoolExecutor(8) as pool:
        texts = [tokens_of(answer) for answer in pool.map(lambda _: ask(pair, prompt, 48), range(8))]
    assert all(text == texts[0] for text in texts)
    assert len(texts[0]) == 48
    assert all(committed > 0 for committed in by_engine(pair, "linocut_positions_committed_total"))


def test_a_beginning_is_in_the_cache_of_the_engine_that_it_goes_to(pair: Server) -> None:
    beginnings = [[(number + 3 * i) % 300 for i in range(200)] for number in (1, 2, 3, 4)]
    for beginning in beginnings:
        tokens_of(ask(pair, beginning))
    for beginning in beginnings:
        usage = ask(pair, [*beginning, 7, 8]).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 192 - 16
    assert all(queries > 0 for queries in by_engine(pair, "linocut_prefix_cache_queries_total"))


def test_a_killed_engine_costs_its_requests_and_is_replaced(pair: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, pair, [number, 5], 1200) for number in range(8)]
        pair.wait_for("linocut_num_requests_running == 8")
        killed = engines(pair)[0]
        killed.kill()
        statuses = [answer.result().status_code for answer in answers]
        assert sorted(statuses) == [200] * 4 + [503] * 4
        assert httpx.get(f"{pair.url}/ready").status_code == 200
        tokens_of(ask(pair, [1, 2, 3]))
    deadline = time.monotonic() + 60
    while by_engine(pair, "linocut_engine_up") != [1, 1]:
        assert time.monotonic() < deadline, pair.log.read_text()
        time.sleep(0.2)
    assert killed.pid not in [engine.pid for engine in engines(pair)]
    with ThreadPoolExecutor(4) as pool:
        assert all(answer.status_code == 200 for answer in pool.map(lambda n: ask(pair, [n], 48), range(4)))
    assert all(committed > 0 for committed in by_engine(pair, "linocut_positions_committed_total"))
    left = engines(pair)
    assert stop(pair) == 0
    assert not any(engine.is_running() for engine in left)
