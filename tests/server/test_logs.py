"""Log lines as machines read them."""

from __future__ import annotations

import json
import logging

import pytest
from fake_engine import FakeEngine, say
from running_server import RunningServer

from linocut.engine.errors import ConfigError
from linocut.server.logs import JsonFormatter, LogSettings, log_event


@pytest.fixture
def lines():
    """What a logger in JSON has written so far."""
    found: list[dict[str, object]] = []

    class Sink(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = self.format(record)
            assert "\n" not in text
            found.append(json.loads(text))

    sink = Sink()
    sink.setFormatter(JsonFormatter())
    logger = logging.getLogger("linocut")
    logger.addHandler(sink)
    level = logger.level
    logger.setLevel("INFO")
    yield found
    logger.removeHandler(sink)
    logger.setLevel(level)


def test_a_message(lines, monkeypatch):
    # Past pytest: its report of what was logged may go to another process, and no surrogate does.
    monkeypatch.setattr(logging.getLogger("linocut"), "propagate", False)
    logging.getLogger("linocut.x").warning("two\nlines, %s", "a \ud800 surrogate")
    assert lines[0]["message"] == "two\nlines, a \ud800 surrogate"
    assert (lines[0]["level"], lines[0]["logger"]) == ("warning", "linocut.x")
    assert str(lines[0]["time"]).endswith("Z")


def test_an_exception(lines):
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("linocut").exception("failed")
    assert "ValueError: why" in str(lines[0]["exception"])


def test_an_event_has_fields_of_its_own(lines):
    log_event(logging.getLogger("linocut"), logging.INFO, "request", "a=1", {"a": 1, "b": None})
    assert {name: lines[0][name] for name in ("message", "a", "b")} == {"message": "request", "a": 1, "b": None}


def test_a_request_is_one_object_without_its_text(lines, tokenizer, ids):
    with RunningServer(FakeEngine(say(ids("an answer"))), tokenizer) as server:
        body = {"messages": [{"role": "user", "content": "private words"}]}
        server.http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"})
        server.http.get("/v1/private/words")
    request, missing = (line for line in lines if line["logger"] == "linocut.requests")
    expected = {
        "message": "request", "request_id": "mine", "method": "POST", "endpoint": "/v1/chat/completions",
        "status": 200, "client": "127.0.0.1", "key": None, "finish": "stop",
    }  # fmt: skip
    assert {name: request[name] for name in expected} == expected
    assert request["prompt_tokens"] > 0
    assert "private" not in json.dumps(request)
    assert (missing["status"], missing["path"]) == (404, "/v1/private/words")


def test_bodies_are_logged_on_request(lines, tokenizer, ids):
    with RunningServer(FakeEngine(say(ids("an answer"))), tokenizer, log_prompts=True) as server:
        for path in ("/v1/chat/completions", "/tokenize"):
            server.http.post(path, json={"messages": [{"role": "user", "content": "private\nwords"}]})
    bodies = [json.loads(line["body"]) for line in lines if line["logger"] == "linocut.requests"]
    assert [body["messages"][0]["content"] for body in bodies] == ["private\nwords"] * 2


@pytest.mark.parametrize("settings", [{"level": "loud"}, {"format": "xml"}])
def test_unknown_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="--log-"):
        LogSettings(**settings)
