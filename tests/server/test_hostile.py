"""Bodies that no honest client sends: a 4xx in the usual shape, small, and the server goes on."""

from __future__ import annotations

import json
import socket

import pytest

URL = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def error(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert len(response.content) < 700
    return found


def body(content: str) -> bytes:
    return b'{"model":"fake","messages":[{"role":"user","content":%s}]}' % content.encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        body('"\\ud800"'),
        body('"\\udc00x"'),
        b'{"model":"fake","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
        b'{"model":"fake","temperature":NaN,"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"fake","temperature":Infinity,"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"fake","temperature":1e999,"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"fake","seed":' + b"9" * 5000 + b',"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"fake","messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"a":'
        + b"[" * 500
        + b"]" * 500
        + b"}}",
        b'{"model":"fake"} x',
    ],
)
def test_malformed_bodies(server, raw):
    error(server.http.post(URL, content=raw, headers=JSON), 400)
    assert not server.engine.adds


def test_errors_do_not_echo_long_texts(server):
    long = "A" * 1_000_000
    for raw in (
        {"model": long, "messages": [{"role": "user", "content": "x"}]},
        {"model": "fake", "messages": [{"role": long, "content": "x"}]},
        {"model": "fake", "messages": [{"role": "user", "content": "x"}], "diffusion": {long: 1}},
        {"model": "fake", "messages": [{"role": "user", "content": "x"}], "diffusion": {"strategy": long}},
        {"model": "fake", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": long}},
        {"model": "fake", "messages": [{"role": "user", "content": "x"}], f"guided_{long}": 1},
    ):
        response = server.http.post(URL, json=raw)
        assert response.status_code in (400, 404)
        assert len(response.content) < 700
        assert "A" * 201 not in response.text


def test_large_bodies(server):
    error(server.http.post(URL, content=b" " * (9 << 20), headers=JSON), 413)
    pieces = (b" " * (1 << 20) for _ in range(10))  # chunked: no length is declared
    error(server.http.post(URL, content=pieces, headers=JSON), 413)


def test_unknown_paths_and_methods(server):
    assert error(server.http.get("/nowhere"), 404)["type"] == "NotFoundError"
    assert error(server.http.get("/v1/nowhere/" + "x" * 5000), 404)["type"] == "NotFoundError"
    response = server.http.get(URL)
    assert error(response, 405)["type"] == "MethodNotAllowedError"
    assert response.headers["allow"] == "POST"
    error(server.http.delete("/health"), 405)
    error(server.http.post(URL + "/", json={}), 404)


def test_other_media_types(server):
    error(server.http.post(URL, content=b"{}", headers={"Content-Type": "text/plain"}), 415)


def test_unknown_models(server):
    found = error(server.http.post(URL, json={"model": "gpt", "messages": [{"role": "user", "content": "x"}]}), 404)
    assert (found["type"], found["param"], found["code"]) == ("NotFoundError", "model", "model_not_found")


def test_not_http_at_all(server):
    host, port = server.url.removeprefix("http://").split(":")
    for junk in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"POST " + b"x" * 100_000):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert server.http.get("/health").status_code == 200


def test_a_body_that_never_comes(tokenizer):
    from fake_engine import FakeEngine
    from running_server import RunningServer

    with RunningServer(FakeEngine(), tokenizer, body_seconds=0.2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
            assert b"408" in connection.recv(65536)


def test_control_characters_in_the_request_id_are_not_echoed(server):
    for sane in ("abc-123", "x" * 128):
        assert server.http.get("/health", headers={"X-Request-Id": sane}).headers["x-request-id"] == sane
    for insane in ("x" * 129, "a b", "a\tb", "ä"):
        headers = {"X-Request-Id": insane.encode("latin-1")}
        given = server.http.get("/health", headers=headers).headers["x-request-id"]
        assert given != insane
        assert len(given) == 24


def test_sixteen_long_stops_on_a_matching_text(server, answering):
    """The worst case for the search of stop strings stays fast."""
    import time

    server.engine.script = answering("a" * 200, chunk=1)
    stops = ["a" * 1000 + chr(98 + i) for i in range(16)]
    began = time.monotonic()
    response = server.http.post(
        URL, content=json.dumps({"messages": [{"role": "user", "content": "x"}], "stop": stops}), headers=JSON
    )
    assert response.json()["choices"][0]["message"]["content"] == "a" * 200
    assert time.monotonic() - began < 2
