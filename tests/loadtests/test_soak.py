"""Short runs of the commands in loadtests/, against a tiny model of random weights, and faults they must notice."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtests.contract import run_contract
from loadtests.hostile import attack
from loadtests.serving import Served, served
from loadtests.soak import Tally, _ask, soak

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    options = ("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "1M", "--log-level", "error")
    with served(None, None, *options) as running:
        yield running


def test_random_requests_some_of_them_cut_off(server: Served) -> None:
    tally = asyncio.run(soak(server, 120, 12, seed=5))
    assert tally.faults == []
    assert tally.outcomes["answered"] > 40
    assert tally.outcomes["hung up"] > 5
    assert tally.outcomes["refused 400"] > 5


def test_bodies_and_sockets_of_hostile_clients(server: Served) -> None:
    tally = asyncio.run(attack(server, 150, 5, seed=5))
    assert tally.faults == []
    assert tally.statuses[200] > 5
    assert tally.statuses[400] > 50
    assert sum(tally.sockets.values()) == 30


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="the `load` extra is not installed")
def test_the_documented_api(server: Served) -> None:
    assert run_contract(server.url, 3, ["--phases", "coverage,fuzzing", "--include-method", "GET"]) == 0


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="the `load` extra is not installed")
def test_a_scenario_gives_a_table_and_a_plot(server: Served, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.load", "--url", server.url, "--seconds", "2", "--levels", "2"]
    command += ["--scenario", "sweep", "--scenario", "hang up", "--json", "rows.json", "--plot", "plot.png"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["scenario"] for row in rows] == ["sweep", "hang up"]
    assert all(row["requests"] > 0 and row["failed"] == 0 for row in rows)
    assert rows[0]["tokens_per_second"] > 0
    assert (tmp_path / "plot.png").stat().st_size > 1000


# ---------------------------------------------------------------- what the commands must notice


def answers_of(content: bytes, status: int = 200) -> httpx.AsyncClient:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content)

    return httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(answer))


def chunk(index: int, tokens: list[int], finish: str | None = None) -> bytes:
    choice = {"index": index, "token_ids": tokens, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = chunk(0, [1, 2], "length") + chunk(1, [3]) + chunk(1, [4], "length") + USAGE + DONE


@pytest.mark.parametrize(
    ("content", "status", "faults"),
    [
        (WHOLE, 200, 0),
        (WHOLE.removesuffix(DONE), 200, 1),
        (WHOLE.replace(b'"length"', b"null", 1), 200, 1),
        (WHOLE.replace(b"[3]", b"[]"), 200, 1),
        (WHOLE.replace(b": 4}", b": 5}"), 200, 1),
        (b'{"error":{"code":"queue_full"}}', 503, 0),
        (b'{"error":{"code":"engine_dead"}}', 503, 1),
        (b"oops", 500, 1),
    ],
)
def test_what_is_not_whole_is_a_fault(content: bytes, status: int, faults: int) -> None:
    tally = Tally()
    body = {"n": 2, "max_tokens": 2, "stream": True, "ignore_eos": True}
    asyncio.run(_ask(answers_of(content, status), body, tally))
    assert len(tally.faults) == faults


def test_pages_that_are_held_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = {
        "linocut_kv_pages": 9.0, "linocut_kv_pages_free": 5.0, "linocut_kv_pages_cached": 4.0,
        "linocut_num_requests_running": 0.0, "linocut_num_requests_waiting": 0.0, "linocut_choices_in_flight": 0.0,
    }  # fmt: skip
    for change, left in (
        ({}, ""),
        ({"linocut_kv_pages_free": 4.0}, "1 pages held, 0 choices in the engine, 0 in the server"),
        ({"linocut_num_requests_waiting": 1.0}, "0 pages held, 1 choices in the engine, 0 in the server"),
        ({"linocut_choices_in_flight": 2.0}, "0 pages held, 0 choices in the engine, 2 in the server"),
    ):
        monkeypatch.setattr(Served, "metrics", lambda _, change=change: idle | change)
        assert Served("http://fake").leftovers(seconds=0.1) == left
