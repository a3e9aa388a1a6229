"""API keys from a file: who is let in, how often, and what changes while the server runs."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine, Step, say
from running_server import RunningServer

from linocut.engine.errors import ConfigError
from linocut.server.api_errors import TooManyRequests, Unauthorized
from linocut.server.auth import KeyRing
from linocut.server.key_file import read_key_file
from linocut.server.quota import Limits, Quota

URL = "/v1/completions"
BODY = {"prompt": [5, 6, 7, 8], "max_tokens": 6}


def as_holder(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    digest = hashlib.sha256(b"secret-of-bob").hexdigest()
    path = tmp_path / "keys.toml"
    path.write_text(f'[alice]\nkey = "secret-of-alice"\nrequests_per_minute = 2\n\n[bob]\nsha256 = "{digest}"\n')
    return path


# ---------------------------------------------------------------- the file


def test_keys_are_given_as_they_are_or_as_their_digest(file):
    assert [entry.name for entry in read_key_file(file)] == ["alice", "bob"]
    ring = KeyRing(file=file)
    assert ring.check(b"Bearer secret-of-alice").name == "alice"
    assert ring.check(b"bearer secret-of-bob").name == "bob"
    for wrong in (None, b"", b"Bearer", b"Bearer alice", b"secret-of-bob", b"Bearer secret-of-bo"):
        with pytest.raises(Unauthorized):
            ring.check(wrong)


def test_an_empty_file_lets_nobody_in(tmp_path):
    (tmp_path / "keys.toml").write_text("")
    ring = KeyRing(file=tmp_path / "keys.toml")
    assert ring.guards("/v1/models")
    with pytest.raises(Unauthorized):
        ring.check(b"Bearer ")
    assert not KeyRing().guards("/v1/models")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[alice", "is not valid TOML"),
        ('key = "secret-of-alice"', "key: Expected `object`"),
        ("[alice]", "alice: either key or sha256"),
        ('[alice]\nkey = "secret-of-alice"\nsha256 = "' + "0" * 64 + '"', "alice: either key or sha256"),
        ('[alice]\nkey = "short"', "alice: Expected `str` of length >= 8"),
        ('[alice]\nkey = "secret of alice"', "alice: Expected `str` matching"),
        ('[alice]\nsha256 = "12"', "alice: Expected `str` matching"),
        ('["a b"]\nkey = "secret-of-alice"', "a name has"),
        ('[alice]\nkey = "secret-of-alice"\nrpm = 3', "alice: Object contains unknown field `rpm`"),
        ('[alice]\nkey = "secret-of-alice"\nrequests_per_minute = 0', "alice: Expected `float` > 0"),
        ('[a]\nkey = "secret-of-alice"\n[b]\nkey = "secret-of-alice"', "a and b have the same key"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_its_keys(tmp_path, text, message):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="keys") as caught:
        KeyRing(file=path)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(file=tmp_path / "none.toml")


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(file, caplog):
    ring = KeyRing(("fixed-key",), file)
    alice = ring.check(b"Bearer secret-of-alice")
    file.write_text('[carol]\nkey = "secret-of-carol"\n')
    ring.refresh()
    assert ring.check(b"Bearer secret-of-carol").name == "carol"
    assert ring.check(b"Bearer fixed-key").name.startswith("sha256:")
    with pytest.raises(Unauthorized):
        ring.check(b"Bearer secret-of-alice")
    file.write_text("[carol")
    ring.refresh()
    ring.refresh()
    assert [record.levelname for record in caplog.records] == ["ERROR"], "it is said once"
    assert ring.check(b"Bearer secret-of-carol").name == "carol"
    file.unlink()
    ring.refresh()
    assert ring.check(b"Bearer secret-of-carol").name == "carol"
    assert alice.name == "alice"


def test_a_new_link_is_a_change(tmp_path):
    """As Kubernetes replaces mounted secrets."""
    for name in ("first", "second"):
        (tmp_path / name).write_text(f'[{name}]\nkey = "secret-of-{name}"\n')
        os.utime(tmp_path / name, (1, 1))
    link = tmp_path / "keys.toml"
    link.symlink_to("first")
    ring = KeyRing(file=link)
    link.unlink()
    link.symlink_to("second")
    ring.refresh()
    assert ring.check(b"Bearer secret-of-second").name == "second"


def test_reading_a_file_again_forgives_nothing(file):
    ring = KeyRing(file=file)
    for _ in range(2):
        ring.check(b"Bearer secret-of-alice").quota.enter()
    ring.refresh(force=True)
    with pytest.raises(TooManyRequests):
        ring.check(b"Bearer secret-of-alice").quota.enter()
    file.write_text(file.read_text().replace("requests_per_minute = 2", "requests_per_minute = 30"))
    ring.refresh()
    ring.check(b"Bearer secret-of-alice").quota.enter()


# ---------------------------------------------------------------- quotas


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def wait_of(quota: Quota) -> int:
    """Seconds that a refusal names; 0 if there is none."""
    try:
        quota.enter()
    except TooManyRequests as refusal:
        return int(refusal.headers["Retry-After"])
    return 0


def test_requests_a_minute():
    clock = Clock()
    quota = Quota(Limits(requests_per_minute=6), clock)
    assert [wait_of(quota) for _ in range(7)] == [0] * 6 + [10]
    clock.now += 9
    assert wait_of(quota) == 1
    clock.now += 1
    assert [wait_of(quota), wait_of(quota)] == [0, 10]
    clock.now += 1000
    assert [wait_of(quota) for _ in range(7)] == [0] * 6 + [10], "no more than a minute's is saved up"


def test_less_than_one_request_a_minute():
    clock = Clock()
    quota = Quota(Limits(requests_per_minute=0.5), clock)
    assert [wait_of(quota), wait_of(quota)] == [0, 120]
    clock.now += 120
    assert wait_of(quota) == 0


def test_tokens_a_minute_are_counted_when_they_are_known():
    clock = Clock()
    quota = Quota(Limits(tokens_per_minute=600), clock)
    assert [wait_of(quota), wait_of(quota)] == [0, 0]
    quota.leave(500)
    assert wait_of(quota) == 0
    quota.leave(700)
    assert wait_of(quota) == 61  # 1200 of 600 are used; ten come back each second
    clock.now += 60.2
    assert wait_of(quota) == 0


def test_requests_at_a_time():
    quota = Quota(Limits(concurrent_requests=2))
    assert [wait_of(quota) for _ in range(3)] == [0, 0, 1]
    quota.leave(10)
    assert [wait_of(quota), wait_of(quota)] == [0, 1]


def test_no_limits():
    quota = Quota(Limits())
    assert [wait_of(quota) for _ in range(1000)] == [0] * 1000
    quota.leave(10**9)
    assert wait_of(quota) == 0


# ---------------------------------------------------------------- a server


def test_a_server_lets_holders_in_within_their_limits(file):
    with RunningServer(FakeEngine(say([5, 6, 7])), None, api_key_file=file) as server:
        for key, statuses in (("secret-of-alice", [200, 200, 429]), ("secret-of-bob", [200] * 3), ("x", [401] * 3)):
            answers = [server.http.post(URL, json=BODY, headers=as_holder(key)) for _ in range(3)]
            assert [answer.status_code for answer in answers] == statuses
        refusal = server.http.post(URL, json=BODY, headers=as_holder("secret-of-alice"))
        assert refusal.json()["error"]["type"] == "RateLimitError"
        assert refusal.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refusal.headers["retry-after"]) <= 30
        assert "linocut_rate_limited_total" in server.http.get("/metrics").text
        assert server.service.metrics._of["rate_limited"]._value.get() == 2


def test_tokens_of_answers_are_charged(file):
    file.write_text('[alice]\nkey = "secret-of-alice"\ntokens_per_minute = 12\n')
    with RunningServer(FakeEngine(say([5, 6, 7, 8, 9, 10])), None, api_key_file=file) as server:
        headers = as_holder("secret-of-alice")
        for stream in (False, True):  # ten tokens each: four of the prompt, six of the answer
            assert server.http.post(URL, json={**BODY, "stream": stream}, headers=headers).status_code == 200
        # Charged once the answer has left: the client may be here before.
        deadline = time.monotonic() + 5
        while (refusal := server.http.get("/v1/models", headers=headers)).status_code != 429:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert server.http.post(URL, json=BODY, headers=headers).status_code == 429
        assert 40 <= int(refusal.headers["retry-after"]) <= 45


def test_a_place_is_free_again_when_a_client_hangs_up(file):
    file.write_text('[alice]\nkey = "secret-of-alice"\nconcurrent_requests = 1\n')
    with RunningServer(FakeEngine(lambda request, choice: [Step([5])]), None, api_key_file=file) as server:
        headers = as_holder("secret-of-alice")
        with server.http.stream("POST", URL, json={**BODY, "stream": True}, headers=headers) as response:
            assert response.status_code == 200
            assert server.http.post(URL, json=BODY, headers=headers).status_code == 429
        deadline = time.monotonic() + 5
        while server.http.get("/v1/models", headers=headers).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_change_of_the_file_reaches_a_running_server(file):
    with RunningServer(FakeEngine(say([5])), None, api_key_file=file) as server:
        file.write_text('[carol]\nkey = "secret-of-carol"\n')
        deadline = time.monotonic() + 5
        while server.http.get("/v1/models", headers=as_holder("secret-of-carol")).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.http.get("/v1/models", headers=as_holder("secret-of-bob")).status_code == 401


def test_the_log_names_the_holder_and_never_the_key(file, caplog):
    with RunningServer(FakeEngine(say([5])), None, api_key_file=file, api_keys=("the-fixed-key",)) as server:
        with caplog.at_level("INFO", "linocut"):
            for key in ("secret-of-bob", "the-fixed-key", "a-wrong-key"):
                server.http.post(URL, json=BODY, headers=as_holder(key))
            deadline = time.monotonic() + 5  # a line is written after the answer
            while sum(record.name == "linocut.requests" for record in caplog.records) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        lines = [record.getMessage() for record in caplog.records if record.name == "linocut.requests"]
    digest = hashlib.sha256(b"the-fixed-key").hexdigest()[:8]
    assert [next((w for w in line.split() if w.startswith("key=")), "") for line in lines] == [
        "key=bob", f"key=sha256:{digest}", ""
    ]  # fmt: skip
    assert all("client=127.0.0.1" in line for line in lines)
    assert "secret-of" not in caplog.text
    assert "the-fixed-key" not in caplog.text


def test_server_info_has_what_was_resolved_and_no_secret(file, tokenizer):
    with RunningServer(FakeEngine(), tokenizer, api_key_file=file, api_keys=("the-fixed-key",)) as server:
        assert server.http.get("/server_info").status_code == 401
        answer = server.http.get("/server_info", headers=as_holder("the-fixed-key"))
    info = answer.json()
    assert info["model"]["max_model_len"] == 512
    assert info["model"]["default_strategy"] == "threshold"
    assert info["server"]["keys"] == 3
    assert info["server"]["stall_seconds"] == 60.0
    assert info["versions"]["python"]
    assert "the-fixed-key" not in answer.text
    assert "secret" not in answer.text
    assert json.dumps(info)


def test_many_threads_of_one_caller_stay_within_the_limit(file):
    file.write_text('[alice]\nkey = "secret-of-alice"\nrequests_per_minute = 20\n')
    with RunningServer(FakeEngine(say([5])), None, api_key_file=file) as server:
        statuses: list[int] = []

        def ask() -> None:
            for _ in range(10):
                answer = server.http.post(URL, json=BODY, headers=as_holder("secret-of-alice"))
                statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(statuses) == 40
    assert 20 <= statuses.count(200) <= 23  # some come back while we ask
    assert set(statuses) == {200, 429}
