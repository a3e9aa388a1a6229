"""Several engines behind one server: who gets what, and what happens when one dies."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from fake_engine import FakeEngine, Step, model_info, say, silence
from running_server import RunningServer

from linocut.server import replicas
from linocut.server.engine_launch import Launch

URL = "/v1/completions"
ANSWER = say([5, 6, 7])


class Slot:
    """One engine after the other: those that are given, then answering ones."""

    def __init__(self, *engines: FakeEngine) -> None:
        self._next = iter(engines)
        self.launched: list[FakeEngine] = []

    def launch(self, input_endpoint: str, output_endpoint: str) -> FakeEngine:
        engine = next(self._next, None) or FakeEngine(ANSWER)
        self.launched.append(engine)
        return engine.launch(input_endpoint, output_endpoint)


def serving(*slots: FakeEngine | Slot, interface: str | None = None, **settings: object) -> RunningServer:
    """A server with an engine for each; an engine that dies is followed by one that answers."""
    launches = [Launch((slot if isinstance(slot, Slot) else Slot(slot)).launch, interface) for slot in slots]
    return RunningServer(FakeEngine(), None, launches, **settings)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PAUSES", (0.0, 0.01, 0.02))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def ask(server: RunningServer, prompt: object = (3, 4), **fields: object) -> httpx.Response:
    return server.http.post(URL, json={"prompt": prompt, "max_tokens": 8, **fields})


def up(server: RunningServer) -> list[float]:
    lines = server.http.get("/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith("linocut_engine_up{")]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def submit(pool: ThreadPoolExecutor, server: RunningServer, engine: FakeEngine, **fields: object) -> Future:
    """A request that is known to have reached `engine`."""
    before = len(engine.adds)
    answer = pool.submit(ask, server, **fields)
    assert engine.wait_for(lambda engine: len(engine.adds) > before)
    return answer


def test_requests_that_run_together_are_spread(pool):
    one, two = FakeEngine(silence), FakeEngine(silence)
    with serving(one, two, shutdown_seconds=0.1) as server:
        for number in range(6):
            pool.submit(ask, server, prompt=[number])
        until(lambda: len(one.adds) == len(two.adds) == 3)
        server.stop()


def test_a_prompt_goes_where_its_beginning_went():
    one, two = FakeEngine(ANSWER), FakeEngine(ANSWER)
    with serving(one, two) as server:
        beginnings = [[number] * 130 for number in range(4)]
        for turn in range(3):
            for beginning in beginnings:
                assert ask(server, [*beginning, *[50] * turn * 10]).status_code == 200
    assert len(one.adds) == len(two.adds) == 6
    assert not {add.prompt[0] for add in one.adds} & {add.prompt[0] for add in two.adds}


def test_the_prompts_of_a_call_are_spread_and_come_back_in_order():
    def script(request, choice):
        return say([10 + request.prompt[0]])(request, choice)

    one, two = FakeEngine(script), FakeEngine(script)
    with serving(one, two) as server:
        answer = ask(server, [[number] for number in range(6)], n=2, return_token_ids=True).json()
    assert len(one.adds) == len(two.adds) == 3
    assert [choice["token_ids"][0] for choice in answer["choices"]] == [10 + n for n in range(6) for _ in range(2)]


def test_places_are_those_of_all_engines_together_and_a_prompts_choices_stay_together(pool):
    info = model_info(max_running=2, max_queued=1)
    one, two = FakeEngine(silence, info), FakeEngine(silence, info)
    with serving(one, two, shutdown_seconds=0.1) as server:
        too_many = ask(server, n=4)
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
        submit(pool, server, one, n=2)
        submit(pool, server, two, n=2)
        full = ask(server, n=2)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        split = ask(server, prompt=[[1], [2], [3]])
        assert split.status_code == 503
        assert len(one.adds) == len(two.adds) == 1, "nothing of a refused call is sent"
        pool.submit(ask, server, prompt=[[1], [2]])
        until(lambda: len(one.adds) == len(two.adds) == 2)
        assert server.service.engine.in_flight == 6
        server.stop()


def test_the_requests_of_an_engine_that_dies_fail_and_the_others_go_on(pool):
    lives = FakeEngine(lambda request, choice: [Step([7]), Step([8], "stop", after=1.0)])
    dies, follows = FakeEngine(silence), FakeEngine(ANSWER)
    with serving(lives, Slot(dies, follows)) as server:
        lasting = submit(pool, server, lives)
        failing = submit(pool, server, dies)
        dies.die()
        assert failing.result().status_code == 503
        assert failing.result().json()["error"]["code"] == "engine_dead"
        assert server.http.get("/ready").status_code == 200
        assert server.http.get("/health").status_code == 200
        assert ask(server).status_code == 200
        assert lasting.result().json()["choices"][0]["finish_reason"] == "stop"
        until(lambda: up(server) == [1, 1])
        until(lambda: ask(server).status_code == 200 and bool(follows.adds))
        server.stop()
        assert server.join() == 0


def test_a_stream_that_has_begun_on_an_engine_that_dies_ends_with_an_error():
    one, two = FakeEngine(lambda request, choice: [Step([5])]), FakeEngine(ANSWER)
    with serving(one, two) as server:
        body = {"prompt": [3], "max_tokens": 8, "stream": True}
        with server.http.stream("POST", URL, json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            one.die("out of memory")
            rest = list(lines)
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert rest[-1] == "data: [DONE]"


def test_a_call_that_was_spread_fails_whole_and_leaves_nothing_on_the_engine_that_lives(pool):
    one, two = FakeEngine(silence), FakeEngine(silence)
    with serving(one, two) as server:
        answer = submit(pool, server, one, prompt=[[1], [2]])
        assert two.wait_for(lambda engine: engine.adds)
        one.die()
        assert answer.result().status_code == 503
        assert two.wait_for(lambda engine: engine.aborts)
        assert two.aborts[0].request_id == two.adds[0].request_id
        until(lambda: server.service.engine.in_flight == 0)


def test_what_an_engine_had_in_its_cache_is_forgotten_with_it():
    lives, dies, follows = FakeEngine(ANSWER), FakeEngine(ANSWER), FakeEngine(ANSWER)
    with serving(Slot(dies, follows), lives) as server:
        for beginning in (1, 2, 3):
            ask(server, [beginning] * 100)
        assert [add.prompt[0] for add in dies.adds] == [1, 3]
        engines, before = server.service.engine.engines, server.service.engine.engines[0]
        dies.die()
        until(lambda: engines[0] is not before)
        ask(server, [1] * 100)
        assert [add.prompt[0] for add in lives.adds] == [2, 1]
        assert not follows.adds


def test_an_engine_that_hangs_is_replaced(pool):
    idle, hangs, follows = FakeEngine(ANSWER), FakeEngine(silence), FakeEngine(ANSWER)
    with serving(Slot(hangs, follows), idle, stall_seconds=0.2) as server:
        answer = submit(pool, server, hangs)
        hangs.hang()
        assert answer.result().status_code == 503
        until(lambda: server.service.engine.engines[0].alive)
        assert not hangs.is_alive()
        assert server.http.get("/ready").status_code == 200
    assert server.exit_code == 0


def test_an_engine_that_does_not_start_again_stays_away_after_three_attempts(caplog):
    def doomed() -> FakeEngine:
        engine = FakeEngine(load_seconds=60.0)
        engine.die("no memory")
        return engine

    lives, dies = FakeEngine(ANSWER), FakeEngine(silence)
    slot = Slot(dies, *(doomed() for _ in range(9)))
    with serving(lives, slot) as server:
        dies.die()
        until(lambda: "stays away" in caplog.text)
        assert len(slot.launched) == 1 + 3
        assert up(server) == [1, 0]
        assert server.http.get("/ready").status_code == 200
        assert all(ask(server).status_code == 200 for _ in range(3))
        lives.die()
        assert server.join() == 1


def test_the_last_engine_takes_the_server_with_it_while_another_one_loads():
    last, dies, loads = FakeEngine(ANSWER), FakeEngine(ANSWER), FakeEngine(ANSWER, load_seconds=30.0)
    slot = Slot(dies, loads)
    with serving(last, slot) as server:
        dies.die()
        until(lambda: loads in slot.launched)
        last.die("gone")
        assert server.join() == 1
        assert "gone" in server.service.engine.failure
        assert not loads.is_alive()


def test_a_server_waits_for_its_last_engine_where_that_was_elsewhere(pool):
    dies, loads = FakeEngine(silence), FakeEngine(ANSWER, load_seconds=1.0)
    with serving(Slot(dies, loads), interface="127.0.0.1") as server:
        assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+", dies.input_endpoint)
        failing = submit(pool, server, dies)
        dies.die()
        assert failing.result().json()["error"]["code"] == "engine_dead"
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200
        assert ask(server).json()["error"]["code"] == "engine_dead"
        until(lambda: server.http.get("/ready").status_code == 200)
        assert ask(server).status_code == 200
        server.stop()
        assert server.join() == 0


def test_a_server_whose_engines_elsewhere_all_stay_away_ends(caplog):
    def doomed() -> FakeEngine:
        engine = FakeEngine(load_seconds=60.0)
        engine.die("no memory")
        return engine

    slots = [Slot(FakeEngine(ANSWER), *(doomed() for _ in range(9))) for _ in range(2)]
    with serving(*slots, interface="127.0.0.1") as server:
        for slot in slots:
            slot.launched[0].die("gone")
        assert server.join() == 1
        assert caplog.text.count("stays away") == 2
        assert server.service.engine.failure == "gone"


def test_what_engines_count_is_told_by_engine():
    one, two = FakeEngine(ANSWER), FakeEngine(ANSWER, model_info(device="cuda:1"))
    with serving(one, two) as server:
        text = server.http.get("/metrics").text
        assert 'linocut_num_requests_running{engine="0",model_name="fake"}' in text
        assert 'linocut_num_requests_running{engine="1",model_name="fake"}' in text
        engines = server.http.get("/server_info").json()["engines"]
    assert [engine["device"] for engine in engines] == ["cpu", "cuda:1"]
    assert all(engine["alive"] for engine in engines)
