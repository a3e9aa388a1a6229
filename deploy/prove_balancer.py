"""Two real servers behind a balancer, killed and drained under load: `python deploy/prove_balancer.py [nginx]`.

    apt-get install haproxy nginx

Runs balancer/haproxy.cfg (or balancer/nginx.conf) as it is shipped, but for the addresses, in front of two
`linocut serve` with the embedded model. Clients ask without a pause, half of them for streams, while

    nothing happens, a server is killed, an engine is killed, a server is told to stop (SIGTERM):
    each time the one with more requests.

No request may be lost that no byte of an answer had come for; a stream that had begun ends whole or by an error that
the client notices; SIGTERM breaks nothing. The counts go to standard output; the status is 1 if one of these fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from balancer_load import CONVERSATIONS, Call, Load
from prove_load import free_port, process, wait_for

HERE = Path(__file__).parent.resolve()
FILES = {"haproxy": HERE / "balancer" / "haproxy.cfg", "nginx": HERE / "balancer" / "nginx.conf"}
SERVER = ["--max-running", "4", "--threads", "1", "--dtype", "float32", "--kv-memory", "256M"]
SERVER += ["--drain-seconds", "3", "--shutdown-seconds", "90", "--log-level", "warning"]
SECONDS = 30
COLUMNS = ("asked", "streams", "whole", "cut", "left", "lost", "truncated", "waiting", "streaming", "there", "again")


@dataclass
class Server:
    """One replica: its process, started again on the same port."""

    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        run = "from linocut.server.cli import main; main()"
        command = [sys.executable, "-c", run, "serve", *SERVER, "--port", str(self.port)]
        with self.log.open("ab") as sink:
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            self.process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        wait_for(f"http://127.0.0.1:{self.port}/ready", self.process, 600)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill_engine(self) -> None:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        max(children, key=lambda child: child.memory_info().rss).kill()

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30).text
        return {name: float(value) for name, value in re.findall(r"^(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}

    def in_flight(self) -> int:
        return int(self.metrics()["linocut_choices_in_flight"])

    def idle(self) -> str:
        """What it still holds when nobody asks; empty if nothing."""
        deadline = time.monotonic() + 30
        while True:
            found = self.metrics()
            flying = found["linocut_choices_in_flight"] + found["linocut_num_requests_running"]
            held = found["linocut_kv_pages"] - found["linocut_kv_pages_free"] - found["linocut_kv_pages_cached"]
            if flying == held == 0:
                return ""
            if time.monotonic() > deadline:
                return f"{flying:.0f} choices and {held:.0f} pages at port {self.port}"
            time.sleep(0.2)


def balancer_file(kind: str, folder: Path, servers: list[str], port: int = 8080, metrics_port: int = 8404) -> Path:
    """The shipped configuration with these addresses, written to `folder`."""
    text = FILES[kind].read_text()
    listening = (":8080", f"127.0.0.1:{port}") if kind == "haproxy" else ("listen 8080", f"listen 127.0.0.1:{port}")
    for name, to in (
        ("linocut-1:8000", servers[0]),
        ("linocut-2:8000", servers[1]),
        listening,
        ("127.0.0.1:8404", f"127.0.0.1:{metrics_port}"),
    ):
        if name not in text and name != "127.0.0.1:8404":
            raise ValueError(f"{FILES[kind]} has no {name}")
        text = text.replace(name, to)
    file = folder / FILES[kind].name
    file.write_text(text)
    return file


@contextlib.contextmanager
def balancer(kind: str, ports: list[int], port: int, metrics_port: int, folder: Path) -> Iterator[None]:
    file = balancer_file(kind, folder, [f"127.0.0.1:{number}" for number in ports], port, metrics_port)
    program = shutil.which(kind, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        sys.exit(f"no {kind} here (Debian: {kind})")
    arguments = {
        "haproxy": ["-db", "-f", str(file)],
        "nginx": ["-p", str(folder), "-c", str(file), "-g", f"daemon off; pid {folder}/nginx.pid;"],
    }
    with process([program, *arguments[kind]], folder / f"{kind}.log", dict(os.environ)) as running:
        wait_for(f"http://127.0.0.1:{port}/ready", running, 30)
        yield


def asked_again(kind: str, metrics_port: int, calls: list[Call]) -> int:
    """Requests that the balancer has sent once more: since its start by HAProxy's own count, of `calls` by nginx."""
    if kind == "nginx":
        return sum("," in call.replica for call in calls)
    text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30).text
    found = re.findall(r'^haproxy_backend_(?:retry|redispatch)_warnings_total\{proxy="replicas"\} (\S+)$', text, re.M)
    return int(sum(map(float, found)))


def count(calls: list[Call], moment: float) -> Counter[str]:
    """Outcomes; and at `moment`: how many had not begun, how many streamed."""
    counts = Counter(call.outcome for call in calls)
    counts["asked"], counts["streams"] = len(calls), sum(call.stream for call in calls)
    running = [call for call in calls if call.began < moment < call.ended]
    counts["streaming"] = sum(call.started is not None and call.started <= moment for call in running)
    counts["waiting"] = len(running) - counts["streaming"]
    return counts


def affinity(calls: list[Call]) -> str:
    """How far conversations kept to one replica, and what they found in its cache."""
    whole = [call for call in calls if call.outcome == "whole"]
    kept = 0
    for number in range(CONVERSATIONS):
        replicas = Counter(call.replica for call in whole if call.conversation == number)
        kept += max(replicas.values(), default=0)
    spread = Counter(call.replica for call in whole)
    tokens, cached = sum(call.prompt_tokens for call in whole), sum(call.cached_tokens for call in whole)
    return (
        f"{kept} of {len(whole)} requests went to their conversation's usual replica, "
        f"{cached / max(tokens, 1):.0%} of prompt tokens came from its cache; requests by replica: "
        + ", ".join(str(number) for number in sorted(spread.values()))
    )


def prove(kind: str, seconds: float, folder: Path) -> Iterator[str]:
    """Run it all and print the table; yields what must not be."""
    chance = random.Random(5)
    servers = [Server(free_port(), folder / f"server-{number}.log") for number in (1, 2)]
    events: dict[str, Callable[[Server], None] | None] = {
        "nothing": None,
        "SIGKILL of a server": lambda server: server.send(signal.SIGKILL),
        "SIGKILL of an engine": Server.kill_engine,
        "SIGTERM of a server": lambda server: server.send(signal.SIGTERM),
    }
    port, metrics_port = free_port(), free_port()
    try:
        for server in servers:
            server.start()
        with balancer(kind, [server.port for server in servers], port, metrics_port, folder):
            print("| event |", " | ".join(COLUMNS), "|")
            print("|---" * (1 + len(COLUMNS)) + "|", flush=True)
            before = asked_again(kind, metrics_port, [])
            for event, strike in events.items():
                load = Load(f"http://127.0.0.1:{port}", chance)
                there: list[tuple[int, Server]] = []

                def during(strike: Any = strike, there: list[tuple[int, Server]] = there) -> None:
                    if strike is not None:
                        there.append(
                            max(((server.in_flight(), server) for server in servers), key=lambda pair: pair[0])
                        )
                        strike(there[0][1])

                moment = asyncio.run(load.run(during, seconds))
                counts = count(load.calls, moment)
                total = asked_again(kind, metrics_port, load.calls)
                counts["again"] = total - before if kind == "haproxy" else total
                before = total
                counts["there"] = there[0][0] if there else 0
                print(f"| {event} |", " | ".join(str(counts[name]) for name in COLUMNS), "|", flush=True)
                yield from faults_of(event, load.calls)
                if not there:
                    said = affinity(load.calls)
                    continue
                victim = there[0][1]
                assert victim.process is not None
                status = victim.process.wait(120)
                if event.startswith("SIGTERM") and status != 0:
                    yield f"{event}: it ended with {status}"
                victim.start()
                time.sleep(6)  # until the balancer sends to it again
            print(f"\n{said}")
        yield from filter(None, (server.idle() for server in servers))
    finally:
        for server in servers:
            if server.process is not None and server.process.poll() is None:
                server.process.kill()
                server.process.wait()


def faults_of(event: str, calls: list[Call]) -> Iterator[str]:
    """No request is lost or ends in silence; where nothing was killed, none is cut; only streams are."""
    for call in calls:
        kind = "stream" if call.stream else "answer"
        allowed = {"whole", "left"} | ({"cut"} if event.startswith("SIGKILL") and call.stream else set())
        if call.outcome not in allowed:
            yield f"{event}: {kind} {call.outcome}: {call.detail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("balancer", nargs="?", choices=FILES, default="haproxy")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of load around each event")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="linocut-proof-") as folder:
        faults = list(prove(options.balancer, options.seconds, Path(folder)))
        if faults:
            for log in sorted(Path(folder).glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
    different = Counter(faults).most_common()
    print("\n".join([f"{len(faults)} faults", *(f"{times} x {fault}" for fault, times in different)]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
