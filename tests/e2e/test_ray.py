"""Engines on a Ray cluster whose nodes are all on this machine: where they are, and what a lost node costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.cluster_utils import Cluster

from linocut.engine.llm import LLM

from .conftest import GOLDEN, Server, start, stop
from .test_replicas import ask, by_engine, tokens_of

SDAR = [str(GOLDEN / "sdar"), "--dtype", "float32", "--max-model-len", "2048", "--kv-memory", "64M"]
PROMPT = [5, 17, 101, 44, 9, 260, 33, 7]
LONG, COMPARED = 1600, 320  # tokens: of answers that take seconds, and as many of them as are looked at
# Ray's own checks: a node that is gone refuses each at once, a slow one has the usual ten seconds to answer.
CHECKS = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500}


@pytest.fixture(scope="module")
def cluster(ray_files: None) -> Iterator[Cluster]:
    """A head that has no room for engines; tests add nodes of one processor. This process can ask it for its state."""
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": CHECKS}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 80 << 20})
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


def lose_node(cluster: Cluster, engine: str, rank: int = 0) -> None:
    """Kill all of the node where a rank is."""
    found = place_of(engine)["bundles_to_node_id"][rank]
    (node,) = (node for node in cluster.worker_nodes if node.node_id == found)
    cluster.remove_node(node, allow_graceful=False)


def place_of(engine: str) -> dict[str, Any]:
    """The placement group of an engine, of the server that runs."""
    tables = ray.util.placement_group_table().values()
    (found,) = (table for table in tables if table["name"] == engine and table["state"] != "REMOVED")
    return dict(found)


def serve(cluster: Cluster, log: Path, *options: str) -> Server:
    return start([*SDAR, "--distributed", "ray", "--ray-address", cluster.address, *options], log)


def until(condition: Callable[[], bool], server: Server, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, server.log.read_text()[-5000:]
        time.sleep(0.2)


def stream(server: Server, prompt: list[int], begun: Callable[[], object]) -> tuple[list[int], str | None]:
    """Token ids of a long answer, and the code of the error that ended it. begun: called at the first event."""
    body = {"prompt": prompt, "max_tokens": LONG, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=200) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in _first(answer.iter_lines(), begun) if line]
    assert lines.pop() == "[DONE]"
    for event in map(json.loads, lines):
        if "error" in event:
            return tokens, event["error"]["code"]
        for choice in event["choices"]:
            tokens += choice.get("token_ids") or []
    return tokens, None


def _first(lines: Iterator[str], begun: Callable[[], object]) -> Iterator[str]:
    yield next(lines)
    begun()
    yield from lines


def alone(prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What one process without a server says."""
    model = LLM(SDAR[0], dtype="float32", device="cpu", max_model_len=2048, kv_memory=64 << 20, threads=1)
    answers = model.generate(prompts, max_tokens=tokens, temperature=0.0, ignore_eos=True)  # type: ignore[arg-type]
    return [answer.token_ids for (answer,) in answers]


def test_a_model_over_two_nodes_says_what_one_process_says_and_returns_with_a_lost_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    add_node(cluster)
    add_node(cluster)
    server = serve(cluster, tmp_path / "log", "--tensor-parallel-size", "2")
    place = place_of("engine 0")
    assert place["strategy"] == "PACK"
    assert len(set(place["bundles_to_node_id"].values())) == 2
    (want,) = alone([PROMPT], 48)
    assert tokens_of(ask(server, PROMPT, 48)) == want

    with ThreadPoolExecutor(2) as pool:
        begun: Future[None] = Future()
        streaming = pool.submit(stream, server, PROMPT, lambda: begun.set_result(None))
        begun.result(60)
        lose_node(cluster, "engine 0", rank=1)
        assert streaming.result()[1] == "engine_dead"
    assert httpx.get(f"{server.url}/ready").status_code == 503
    refused = ask(server, PROMPT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert by_engine(server, "linocut_engine_up") == [0]

    add_node(cluster)
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, server)
    assert tokens_of(ask(server, PROMPT, 48)) == want
    assert stop(server) == 0
    until(lambda: all(t["state"] == "REMOVED" for t in ray.util.placement_group_table().values()), server)


def test_a_lost_node_costs_the_requests_of_its_engine_alone_and_the_engine_returns(
    cluster: Cluster, tmp_path: Path
) -> None:
    while len(cluster.worker_nodes) < 2:
        add_node(cluster)
    server = serve(cluster, tmp_path / "log", "--replicas", "2", "--max-running", "2")
    places = [place_of(f"engine {number}") for number in range(2)]
    assert {place["strategy"] for place in places} == {"STRICT_PACK"}
    assert places[0]["bundles_to_node_id"] != places[1]["bundles_to_node_id"]

    prompts = [[number, *PROMPT] for number in range(4)]
    with ThreadPoolExecutor(8) as pool:
        begun = [Future[None]() for _ in prompts]
        streaming = [
            pool.submit(stream, server, prompt, lambda one=one: one.set_result(None))  # type: ignore[misc]
            for prompt, one in zip(prompts, begun, strict=True)
        ]
        for one in begun:
            one.result(60)
        queued = [pool.submit(ask, server, [7, number]) for number in range(2)]
        server.wait_for("linocut_num_requests_waiting == 2")
        lose_node(cluster, "engine 0")
        ends = [one.result() for one in streaming]
        statuses = [one.result().status_code for one in queued]
    assert sorted(code or "whole" for _, code in ends) == ["engine_dead", "engine_dead", "whole", "whole"]
    for (tokens, code), want in zip(ends, alone(prompts, COMPARED), strict=True):
        assert tokens[:COMPARED] == want[: len(tokens)]
        assert code == "engine_dead" or len(tokens) == LONG
    assert sorted(statuses) == [200, 503]
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert by_engine(server, "linocut_engine_up") == [0, 1]
    tokens_of(ask(server, PROMPT))

    add_node(cluster)
    until(lambda: by_engine(server, "linocut_engine_up") == [1, 1], server)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: tokens_of(ask(server, PROMPT, 48)), range(4)))
    assert answers == alone([PROMPT], 48) * 4
    assert all(committed > 0 for committed in by_engine(server, "linocut_positions_committed_total"))
    assert server.log.read_text().count("is started again") == 1, "it waits for Ray, and does not try by itself"
    assert stop(server) == 0
