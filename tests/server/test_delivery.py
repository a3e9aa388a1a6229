"""What happens when things end before their time: clients leave, queues fill, engines fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import FakeEngine, Step, model_info, say, silence
from running_server import RunningServer
from test_chat import USER, chat, events

from linocut.engine.messages import Abort

URL = "/v1/chat/completions"


def send(server, **fields) -> socket.socket:
    """A request on a socket of our own, to be dropped at will."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "fake", "messages": USER, **fields}).encode()
    connection = socket.create_connection((host, int(port)), timeout=5)
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def aborted(server) -> bool:
    return server.engine.wait_for(lambda engine: bool(engine.aborts), 2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token(server, stream):
    connection = send(server, stream=stream)
    assert server.engine.wait_for(lambda engine: bool(engine.adds))
    connection.close()
    assert aborted(server)
    assert server.engine.aborts == [Abort(request_id=server.engine.adds[0].request_id)]
    assert server.service.engine.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_the_middle(server, ids, stream):
    tokens = ids("word " * 400)
    server.engine.script = say(tokens, chunk=1, after=0.01)
    connection = send(server, stream=stream)
    if stream:
        while b"content" not in connection.recv(65536):
            pass
    else:
        assert server.engine.wait_for(lambda engine: bool(engine.adds))
        time.sleep(0.1)
    connection.close()
    assert aborted(server)
    assert server.service.engine.in_flight == 0


def test_a_client_that_resets_the_connection(server):
    import struct

    connection = send(server, stream=True)
    assert server.engine.wait_for(lambda engine: bool(engine.adds))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert aborted(server)


def test_a_client_that_leaves_while_its_prompt_is_encoded(server, tokenizer, monkeypatch):
    slow = tokenizer.template.render
    begun = threading.Event()

    def render(*arguments):
        begun.set()
        time.sleep(0.3)
        return slow(*arguments)

    monkeypatch.setattr(tokenizer.template, "render", render)
    monkeypatch.setattr("linocut.server.prompts._INLINE_CHARACTERS", 0)
    connection = send(server)
    assert begun.wait(5)
    connection.close()
    assert aborted(server)
    assert [abort.request_id for abort in server.engine.aborts] == [add.request_id for add in server.engine.adds]
    assert server.service.engine.in_flight == 0


def test_a_half_sent_request(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.05)
    time.sleep(0.1)
    assert not server.engine.adds
    assert server.engine.wait_for(lambda engine: server.service.active == 0, 2)


def test_only_the_ended_choice_is_aborted_at_a_stop_string(server, ids):
    tokens = ids("one two three four five")

    def script(request, choice):
        return say(tokens if choice else ids("two hundred words"), chunk=1, after=0.02)(request, choice)

    server.engine.script = script
    answer = chat(server, n=2, stop="hund")
    assert [choice.message.content for choice in answer.choices] == ["two ", "one two three four five"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    request_id = server.engine.adds[0].request_id
    assert server.engine.wait_for(lambda engine: engine.aborts == [Abort(request_id=request_id, choice=0)])
    assert server.service.engine.in_flight == 0


def test_a_stop_string_across_chunks_of_a_stream(server, answering):
    for chunk in (1, 2, 3, 50):
        server.engine.script = answering("Hello there. STOP now", chunk, after=0.005)
        chunks = list(chat(server, stream=True, stop=["there. ST", "nothing"]))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello "
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].choices[0].to_dict()["stop_reason"] == "there. ST"


def test_a_choice_that_fails(server, ids):
    def script(request, choice):
        yield Step(ids("Hello"))
        yield Step([], "error", error="out of luck", after=0.05)

    server.engine.script = script
    with pytest.raises(openai.InternalServerError, match="out of luck"):
        chat(server)
    body = {"model": "fake", "messages": USER, "stream": True}
    with server.http.stream("POST", URL, json=body) as response:
        data = events(response)
    assert data[-1] == "[DONE]"
    assert data[-2]["error"]["type"] == "InternalServerError"
    assert data[1]["choices"][0]["delta"]["content"] == "Hello"
    with pytest.raises(openai.APIError, match="out of luck"):
        list(chat(server, stream=True))
    assert server.service.engine.in_flight == 0


def test_a_full_queue(tokenizer):
    engine = FakeEngine(silence, model_info(max_running=2, max_queued=2))
    with RunningServer(engine, tokenizer, retry_after_seconds=7) as server:
        waiting = [send(server) for _ in range(3)]
        assert engine.wait_for(lambda engine: len(engine.adds) == 3)
        response = server.http.post(URL, json={"model": "fake", "messages": USER, "n": 2})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "7"
        assert response.json()["error"]["type"] == "ServiceUnavailableError"
        assert len(engine.adds) == 3
        assert server.http.post(URL, json={"model": "fake", "messages": USER, "n": 5}).status_code == 400
        prompts = {"model": "fake", "prompt": [[1]] * 5}
        assert server.http.post("/v1/completions", json=prompts).status_code == 400
        for connection in waiting:
            connection.close()
        assert engine.wait_for(lambda engine: len(engine.aborts) == 3)
        assert server.service.engine.in_flight == 0
        assert "admission_rejections_total" in server.http.get("/metrics").text


@pytest.mark.parametrize("fatal", [None, "RuntimeError: out of memory"])
def test_the_engines_death(tokenizer, ids, fatal):
    engine = FakeEngine(say(ids("word " * 200), chunk=1, after=0.05))
    with RunningServer(engine, tokenizer) as server:
        answers: list[httpx.Response] = []
        streams: list[list[object]] = []

        def ask() -> None:
            answers.append(server.http.post(URL, json={"messages": USER}))

        def follow() -> None:
            with httpx.stream("POST", server.url + URL, json={"messages": USER, "stream": True}) as response:
                streams.append(events(response))

        threads = [threading.Thread(target=ask), threading.Thread(target=follow)]
        for thread in threads:
            thread.start()
        assert engine.wait_for(lambda engine: len(engine.adds) == 2)
        time.sleep(0.2)
        assert server.http.get("/health").status_code == 200
        engine.die(fatal)
        began = time.monotonic()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 1
        assert server.http.get("/health").status_code == 503
        assert server.http.get("/ready").status_code == 503
        assert server.http.post(URL, json={"messages": USER}).status_code == 503
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "engine_dead"
        assert streams[0][-1] == "[DONE]"
        assert streams[0][-2]["error"]["type"] == "ServiceUnavailableError"
        assert server.join() == 1


def test_an_engine_that_cannot_start(tokenizer):
    from linocut.engine.errors import EngineDead

    engine = FakeEngine(load_seconds=0.05)
    engine.die("ModelError: no weights")
    with pytest.raises(EngineDead, match="no weights"), RunningServer(engine, tokenizer):
        pass


def test_a_stop_while_the_model_loads(tokenizer):
    engine = FakeEngine(load_seconds=60)
    server = RunningServer(engine, tokenizer)
    server._thread.start()
    assert engine.wait_for(lambda engine: hasattr(engine, "_thread"))
    server.stop()
    assert server.join(3) == 0


def test_shutdown_lets_requests_finish(tokenizer, answering):
    engine = FakeEngine(answering("a b c d e f g h", chunk=1, after=0.05))
    with RunningServer(engine, tokenizer) as server:
        stream = chat(server, stream=True)
        next(iter(stream))
        server.stop()
        deadline = time.monotonic() + 2
        while server.http.get("/ready").status_code == 200:
            assert time.monotonic() < deadline
        assert server.http.get("/health").status_code == 200
        refused = server.http.post(URL, json={"messages": USER})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert "retry-after" in refused.headers
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == "a b c d e f g h"
        assert server.join() == 0


@pytest.mark.parametrize("last_words", [None, "out of memory"])
def test_a_stream_that_has_not_begun_fails_with_a_status(tokenizer, last_words):
    """So that a balancer asks another server."""
    engine = FakeEngine(silence)
    with RunningServer(engine, tokenizer) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.http.post, URL, json={"messages": USER, "stream": True})
        assert engine.wait_for(lambda engine: engine.adds)
        engine.die(last_words)
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "engine_dead"
        assert answer.result().headers["content-type"] == "application/json"


def test_a_choice_that_fails_at_once_fails_its_stream_with_a_status(server):
    server.engine.script = lambda request, choice: [Step([], "error", error="out of luck")]
    answer = server.http.post(URL, json={"messages": USER, "stream": True})
    assert answer.status_code == 500
    assert "out of luck" in answer.json()["error"]["message"]


def test_shutdown_has_a_deadline(tokenizer, ids):
    engine = FakeEngine(lambda request, choice: [Step(ids("Hello"))])
    with RunningServer(engine, tokenizer, shutdown_seconds=0.2) as server:
        with server.http.stream("POST", URL, json={"messages": USER, "stream": True}) as response:
            server.stop()
            data = events(response)
        assert data[-2]["error"]["type"] == "ServiceUnavailableError"
        assert server.join() == 0


def test_slow_readers_do_not_hold_up_others(server, ids, answering):
    server.engine.script = say(ids("word " * 100), chunk=1)
    lazy = send(server, stream=True, max_tokens=400)
    server.engine.script = answering("quick")
    assert chat(server).choices[0].message.content == "quick"
    lazy.close()


def test_a_long_prompt_does_not_block_the_loop(server, answering):
    """While megabytes are encoded, probes answer."""
    server.engine.script = answering("ok")
    body = {"messages": [{"role": "user", "content": "The quick brown fox. " * 100_000}]}
    answers: list[httpx.Response] = []
    waits = []
    with httpx.Client(base_url=server.url) as probe:
        slow = threading.Thread(target=lambda: answers.append(server.http.post(URL, json=body, timeout=30)))
        slow.start()
        while slow.is_alive():
            began = time.monotonic()
            probe.get("/health")
            waits.append(time.monotonic() - began)
            time.sleep(0.01)
    assert answers[0].json()["error"]["code"] == "context_length_exceeded"
    assert len(waits) > 5
    assert max(waits) < 0.5
