"""The server that a command runs against: one that is there already, or one of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from .tiny_model import write_model

READY_SECONDS = 300.0
EMBEDDED = "embedded"
# Of this checkout, even where another Linocut is installed.
_SERVE = "from linocut.server.cli import main; main()"


@dataclass
class Served:
    """A server under test. process: None if it is not ours."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name; of several with one name, their sum."""
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if match := re.match(r"(\w+)(?:\{.*\})? (\S+)$", line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def memory(self) -> int:
        """Bytes that the server's processes have allocated, mapped files left out; 0 if it is not ours."""
        if self.process is None:
            return 0
        root = psutil.Process(self.process.pid)
        infos = [process.memory_info() for process in [root, *root.children(recursive=True)]]
        return sum(info.rss - getattr(info, "shared", 0) for info in infos)

    def leftovers(self, seconds: float = 60.0) -> str:
        """What is still running or holds pages when no client is left; empty if nothing is, within `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            now = self.metrics()
            held = now["linocut_kv_pages"] - now["linocut_kv_pages_free"] - now["linocut_kv_pages_cached"]
            running = now["linocut_num_requests_running"] + now["linocut_num_requests_waiting"]
            flying = now["linocut_choices_in_flight"]
            if held == running == flying == 0:
                return ""
            if time.monotonic() > deadline:
                return f"{held:.0f} pages held, {running:.0f} choices in the engine, {flying:.0f} in the server"
            time.sleep(0.1)


@contextlib.contextmanager
def served(url: str | None = None, model: str | None = None, *options: str) -> Iterator[Served]:
    """The server at `url`, or one of `model` (a folder, EMBEDDED or None: the tiny one) with `options`.

    Ours is stopped at the end. Raises RuntimeError if it does not start, or does not end with status 0.
    """
    if url is not None:
        yield Served(url.rstrip("/"))
        return
    with tempfile.TemporaryDirectory(prefix="linocut-load-") as folder:
        names = [] if model == EMBEDDED else [model or str(write_model(Path(folder) / "tiny"))]
        log = Path(folder) / "log"
        server = _start([*names, *options], log)
        assert server.process is not None
        try:
            yield server
            server.process.send_signal(signal.SIGTERM)
            status = server.process.wait(60)
            if status != 0:
                raise RuntimeError(f"the server ended with status {status}:\n{log.read_text()[-3000:]}")
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()


def _start(arguments: list[str], log: Path) -> Served:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", _SERVE, "serve", *arguments, "--port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        )
    server = Served(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + READY_SECONDS
    try:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                    return server
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
    except BaseException:
        process.kill()
        process.wait()
        raise
