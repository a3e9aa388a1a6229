"""The server as its operator meets it: a process with arguments, signals, and an exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

PROGRAM = Path(__file__).with_name("serve_fake.py")
LONG = {"prompt": "Hi", "stream": True, "max_tokens": 250}
BODY = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


class Program:
    """A running `linocut serve`; its output goes to a file."""

    def __init__(self, folder: Path, log: Path, *arguments: str) -> None:
        self.log = log
        command = [sys.executable, str(PROGRAM), "serve", str(folder), "--port", "0", *arguments]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def find(self, pattern: str, seconds: float = 20) -> str:
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.log.read_text())):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return found[1]

    @property
    def url(self) -> str:
        return self.find(r"(http://\S+)/v1\n")

    @property
    def engine_pid(self) -> int:
        return int(self.find(r"engine pid (\d+)"))

    def exit_code(self, seconds: float = 10) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[object]:
    programs: list[Program] = []

    def begin(*arguments: str, model: Path = folder) -> Program:
        programs.append(Program(model, tmp_path / f"log{len(programs)}", *arguments))
        return programs[-1]

    yield begin
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_announcement_and_a_graceful_end(start, folder):
    program = start("--served-model-name", "it's", "--api-key", "key one")
    url = program.url
    log = program.log.read_text()
    assert "omp PASSIVE" in log
    assert "strategy" in log
    command = program.find(r"(curl .*)\n")
    environment = {**os.environ, "LINOCUT_API_KEY": "key one"}
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=True)
    assert '"finish_reason":"stop"' in answer.stdout
    headers = {"Authorization": "Bearer key one"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        program.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert program.exit_code() == 0
    assert gone(program.engine_pid)
    assert "Traceback" not in program.log.read_text()
    assert str(folder) not in program.log.read_text()


def test_ctrl_c_lets_requests_finish_too(start):
    """The terminal's signal reaches the engine process as well, which must not die of it."""
    program = start()
    with httpx.stream("POST", f"{program.url}/v1/chat/completions", json=BODY) as response:
        lines = response.iter_lines()
        next(lines)
        os.killpg(program.process.pid, signal.SIGINT)
        text = "\n".join(lines)
    assert '"error"' not in text
    assert text.rstrip().endswith("data: [DONE]")
    assert program.exit_code() == 0
    assert "Traceback" not in program.log.read_text()


def test_a_killed_engine_ends_the_server(start):
    program = start()
    url = program.url
    assert httpx.get(f"{url}/health").status_code == 200
    os.kill(program.engine_pid, signal.SIGKILL)
    began = time.monotonic()
    while httpx.get(f"{url}/health").status_code == 200:
        assert time.monotonic() - began < 1
    assert program.exit_code() == 1
    assert "Traceback" not in program.log.read_text()


def test_with_replicas_a_killed_engine_is_started_again(start):
    program = start("--replicas", "2")
    url = program.url
    first = [int(pid) for pid in re.findall(r"engine pid (\d+)", program.log.read_text())]
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)
    third = int(program.find(r"(?s)(?:engine pid \d+.*){2}engine pid (\d+)"))
    assert httpx.get(f"{url}/ready").status_code == 200
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    program.process.send_signal(signal.SIGTERM)
    assert program.exit_code() == 0
    assert gone(first[1])
    assert gone(third)
    assert "Traceback" not in program.log.read_text()


def test_readiness_goes_first_then_new_requests_then_the_server(start):
    """A balancer that looks at /ready twice a second sends nothing that would be refused."""
    program = start("--drain-seconds", "1.5")
    url = program.url
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        assert httpx.get(f"{url}/ready").status_code == 200
        program.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/ready").status_code == 200:
            time.sleep(0.01)
        accepted = httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 2, "stream": False})
        assert accepted.status_code == 200
        assert accepted.headers["connection"] == "close"
        assert httpx.get(f"{url}/health").status_code == 200
        deadline = time.monotonic() + 10
        while (refused := httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 2})).status_code != 503:
            assert time.monotonic() < deadline
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/health").status_code == 200
        text = "\n".join(lines)
    assert '"error"' not in text
    assert text.rstrip().endswith("data: [DONE]")
    assert program.exit_code() == 0


def test_what_does_not_end_within_the_deadline_gets_an_error(start):
    program = start("--shutdown-seconds", "0.3")
    with httpx.stream("POST", f"{program.url}/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        program.process.send_signal(signal.SIGTERM)
        text = [line for line in lines if line]
    assert '"code":"shutting_down"' in text[-2]
    assert text[-1] == "data: [DONE]"
    assert program.exit_code() == 0


def test_signals_to_the_whole_service_leave_the_engine_to_the_server(start):
    """systemd sends SIGTERM to every process of a unit."""
    program = start()
    with httpx.stream("POST", f"{program.url}/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        os.killpg(program.process.pid, signal.SIGTERM)
        text = "\n".join(lines)
    assert '"error"' not in text
    assert program.exit_code() == 0


def test_sighup_reads_the_keys_again(start, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text('[a]\nkey = "first-key"\n')
    program = start("--api-key-file", str(file), "--log-format", "json")
    url = program.find(r'"url": "(http[^"]*)"')
    stamp = file.stat()
    file.write_text('[a]\nkey = "other-key"\n')
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # unseen by the clock
    program.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while httpx.get(f"{url}/models", headers={"Authorization": "Bearer other-key"}).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert httpx.get(f"{url}/models", headers={"Authorization": "Bearer first-key"}).status_code == 401
    program.process.send_signal(signal.SIGTERM)
    assert program.exit_code() == 0
    lines = [line for line in program.log.read_text().splitlines() if not line.startswith("engine pid")]
    messages = [json.loads(line)["message"] for line in lines]
    assert {"ready", "request", "1 API keys are accepted from now on"} <= set(messages)


def test_failures_before_the_start(start, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        runs = [
            (start("--port", port), f"linocut: cannot listen on 127.0.0.1:{port}"),
            (start("--threads", "99"), "linocut: the engine process ended with exit code 3"),
            (start(model=Path("missing")), "linocut: missing is neither"),
            (start("--dtype", "int3"), "linocut: Invalid enum value 'int3'"),
            (start("--page-size", "7"), "linocut: page_size must be a power of two"),
            (start("--replicas", "0"), "linocut: replicas must be between 1 and 64"),
            (start("--log-format", "xml"), "linocut: --log-format 'xml': text, json"),
            (start("--api-key-file", "/missing.toml"), "linocut: /missing.toml cannot be read"),
        ]
        for program, message in runs:
            assert program.exit_code(30) == 1
            assert program.log.read_text().splitlines()[-1].startswith(message), program.log.read_text()
            assert "Traceback" not in program.log.read_text()
