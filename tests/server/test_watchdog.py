"""When silence counts as a hang, and what a server does about it."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from fake_engine import FakeEngine, silence
from running_server import RunningServer

from linocut.engine.messages import EngineStats
from linocut.server.watchdog import SLOWEST_FACTOR, WARM_UP_FACTOR, WARM_UP_FORWARDS, Watchdog


def stats(forwards: int, running: int = 0, waiting: int = 0) -> EngineStats:
    return EngineStats(running=running, waiting=waiting, forwards_by_kind={"denoise": forwards})


BUSY = stats(WARM_UP_FORWARDS, running=1)


def warm(patience: float = 10.0) -> Watchdog:
    watchdog = Watchdog(patience)
    watchdog.hear(BUSY)
    return watchdog


def test_silence_beyond_the_patience_is_a_hang():
    watchdog = warm()
    watchdog.wait(10.0)
    assert not watchdog.stalled
    watchdog.wait(0.1)
    assert watchdog.stalled


def test_a_step_ends_the_silence():
    watchdog = warm()
    for forwards in range(100, 110):
        watchdog.wait(9.0)
        watchdog.hear(stats(forwards, running=1))
    assert not watchdog.stalled


def test_messages_without_a_step_do_not_end_it_while_there_is_work():
    for waiting in (stats(64, running=1), stats(64, waiting=1)):
        watchdog = warm()
        for _ in range(11):
            watchdog.wait(1.0)
            watchdog.hear(waiting)
        assert watchdog.stalled


def test_an_idle_engine_may_stay_idle():
    watchdog = warm()
    for _ in range(100):
        watchdog.wait(1.0)
        watchdog.hear(stats(64))
    assert not watchdog.stalled


def test_the_first_forwards_may_compile():
    watchdog = Watchdog(10.0)
    watchdog.hear(stats(WARM_UP_FORWARDS - 1, running=1))
    watchdog.wait(10.0 * WARM_UP_FACTOR)
    assert not watchdog.stalled
    watchdog.wait(0.1)
    assert watchdog.stalled


def test_a_machine_with_slow_steps_has_more_time():
    watchdog = Watchdog(10.0)
    watchdog.wait(40.0)
    watchdog.hear(BUSY)
    watchdog.wait(40.0 * SLOWEST_FACTOR)
    assert not watchdog.stalled
    watchdog.wait(0.1)
    assert watchdog.stalled


@pytest.mark.parametrize("stream", [False, True])
def test_a_hung_engine_fails_its_requests_and_ends_the_server(tokenizer, stream):
    engine = FakeEngine(silence)
    with RunningServer(engine, tokenizer, stall_seconds=0.2) as server:
        assert server.http.get("/ready").status_code == 200
        answers: list[httpx.Response] = []
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        call = threading.Thread(target=lambda: answers.append(server.http.post("/v1/chat/completions", json=body)))
        call.start()
        assert engine.wait_for(lambda fake: fake.adds)
        engine.hang()
        deadline = time.monotonic() + 10
        while server.http.get("/ready").status_code == 200:
            assert time.monotonic() < deadline
        assert server.http.get("/health").status_code == 503
        assert server.http.post("/v1/chat/completions", json=body).status_code == 503
        call.join(10)
        assert answers[0].status_code == 503  # a stream, too, has not begun
        assert '"code":"engine_dead"' in answers[0].text
        assert server.join() == 1
    assert "no step in" in server.service.engine.failure
    assert not engine.is_alive()
