"""Real servers on loopback ports: the embedded model, and a tiny SDAR checkpoint that starts fast."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """Its value, summed over labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name} in:\n{text}"
        return sum(map(float, found))

    def engine_process(self) -> psutil.Process:
        """The child that holds the model: the one with the most memory."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    def wait_for(self, condition: str, seconds: float = 60.0) -> None:
        """Wait until a metric expression such as `linocut_num_requests_running == 0` holds."""
        name, value = condition.split(" == ")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.metric(name) == float(value):
                return
            time.sleep(0.2)
        pytest.fail(f"{name} is {self.metric(name)}, not {value}")


def start(arguments: list[str], log: Path) -> Server:
    command = [shutil.which("linocut", path=str(Path(sys.executable).parent)) or "linocut", "serve", *arguments]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--port", "0"], stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server exited with {process.returncode}:\n{log.read_text()[-3000:]}")
        if announced := re.search(r"^  (http://\S+)/v1$", log.read_text(errors="replace"), re.MULTILINE):
            server = Server(announced[1], process, log)
            assert httpx.get(f"{server.url}/ready", timeout=30).status_code == 200
            return server
        time.sleep(0.2)
    process.kill()
    pytest.fail(f"the server did not become ready:\n{log.read_text()[-3000:]}")


def stop(server: Server) -> int:
    """End a server as an operator would; returns its exit status."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        server.process.kill()
        pytest.fail(f"the server did not stop:\n{server.log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`linocut serve` without a model, as a newcomer starts it, but in float32 everywhere: tests compare texts."""
    server = start(["--dtype", "float32"], tmp_path_factory.mktemp("embedded") / "log")
    yield server
    assert stop(server) == 0


@pytest.fixture
def sdar(tmp_path: Path) -> Iterator[Server]:
    """A random-weight SDAR of block 4 without a tokenizer, in float32."""
    server = start([str(GOLDEN / "sdar"), "--dtype", "float32", "--max-model-len", "2048"], tmp_path / "log")
    yield server
    if server.process.poll() is None:
        stop(server)
