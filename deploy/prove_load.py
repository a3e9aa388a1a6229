"""A real server under load, scraped by a real Prometheus: every query of the dashboard and of the alerts gives data."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

HERE = Path(__file__).parent.resolve()
SECONDS = 90  # of load
SCRAPE = 2  # seconds; the shipped configuration's 5 would leave too few points
# All the time; at half-time twice as many calls come at once, and some of them are refused.
CLIENTS = 6
SERVER = ["--max-running", "4", "--max-queued", "8", "--page-size", "16", "--kv-memory", "64M", "--dtype", "float32"]
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "verify"},
    {"strategy": "threshold", "threshold": 0.7},
    {"strategy": "static", "denoising_steps": 2},
    {"strategy": "jacobi", "draft_length": 4},
    {"strategy": "autoregressive"},
    {"strategy": "threshold", "threshold": 0.7, "halt": "linear"},
]
QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about rain.",
    "Explain what a printing press does.",
    "Count to ten.",
]
SYSTEM = "You are a patient assistant who answers in short and friendly sentences, and who never makes things up. " * 2


def prove_load(prometheus: str, folder: Path) -> str:
    """Run it all; the panels' data go to folder/panels.json. Raises RuntimeError naming the queries without data."""
    server_port, port = free_port(), free_port()
    with running_server(server_port, folder), running_prometheus(prometheus, port, server_port, folder):
        began = time.time()
        calls = asyncio.run(put_load(f"http://127.0.0.1:{server_port}", SECONDS))
        time.sleep(2 * SCRAPE)
        panels = ask_panels(f"http://127.0.0.1:{port}", began, time.time())
        rules = ask_rules(f"http://127.0.0.1:{port}")
    record = {"calls": dict(calls), "began": began, "seconds": SECONDS, "server": SERVER, "panels": panels}
    (folder / "panels.json").write_text(json.dumps(record))
    empty = [
        f"{panel['title']}: {query['query']}" for panel in panels for query in panel["queries"] if not has_data(query)
    ]
    unhealthy = [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]
    if empty or unhealthy:
        raise RuntimeError("\n".join(["without data or in error:", *empty, *unhealthy]))
    asked = sum(len(panel["queries"]) for panel in panels)
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(calls.items()))
    return f"{asked} queries of {len(panels)} panels gave data, {len(rules)} alert rules were evaluated; calls: {said}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(port: int, folder: Path) -> Iterator[None]:
    run = "from linocut.server.cli import main; main()"
    command = [sys.executable, "-c", run, "serve", *SERVER, "--port", str(port)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with process(command, folder / "server.log", environment) as server:
        wait_for(f"http://127.0.0.1:{port}/ready", server, 600)
        yield


@contextlib.contextmanager
def running_prometheus(program: str, port: int, server_port: int, folder: Path) -> Iterator[None]:
    """With the shipped rules and the shipped job, but this server in place of the name that compose resolves."""
    config = yaml.safe_load((HERE / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"}
    config["rule_files"] = [str(HERE / "prometheus" / name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["scrape_timeout"] = f"{SCRAPE}s"
        job["static_configs"] = [{"targets": [f"127.0.0.1:{server_port}"]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    data = folder / f"prometheus-{port}"
    command = [
        program,
        f"--config.file={file}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with process(command, folder / "prometheus.log", dict(os.environ)) as running:
        wait_for(f"http://127.0.0.1:{port}/-/ready", running, 60)
        yield


@contextlib.contextmanager
def process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        running = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()


def wait_for(url: str, running: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if running.poll() is not None:
            raise RuntimeError(f"{running.args!r} ended with {running.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"{url} did not answer")


async def put_load(url: str, seconds: float) -> Counter[str]:
    """Clients that ask one question after the other; outcomes of the calls."""
    outcomes: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        clients = [client(http, random.Random(number), deadline, outcomes) for number in range(CLIENTS)]
        await asyncio.gather(*clients, burst(http, seconds / 2, outcomes))
    return outcomes


async def client(http: httpx.AsyncClient, chance: random.Random, deadline: float, outcomes: Counter[str]) -> None:
    while time.monotonic() < deadline:
        body = {
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": chance.choice(QUESTIONS)}],
            "max_tokens": chance.choice([8, 24, 48]),
            "temperature": chance.choice([0.0, 0.7]),
            "diffusion": chance.choice(STRATEGIES),
            "stream": chance.random() < 0.5,
        }
        kind = chance.random()
        if kind < 0.04:
            body["temperature"] = -1  # a client's mistake
        outcomes[await call(http, body, leaves=kind > 0.95)] += 1
        await asyncio.sleep(chance.expovariate(2.0))


async def burst(http: httpx.AsyncClient, after: float, outcomes: Counter[str]) -> None:
    await asyncio.sleep(after)
    body = {"messages": [{"role": "user", "content": QUESTIONS[1]}], "max_tokens": 16, "stream": True}
    outcomes.update(await asyncio.gather(*(call(http, body, leaves=False) for _ in range(2 * CLIENTS))))


async def call(http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> str:
    """Ask; `leaves`: hang up at the first chunk."""
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                if leaves and body["stream"]:
                    return "left"
            return str(response.status_code)
    except httpx.TransportError as error:
        return type(error).__name__


def ask_panels(url: str, began: float, ended: float) -> list[dict[str, Any]]:
    """Every query of the dashboard over the time of the load, as Grafana would send it."""
    board = json.loads((HERE / "grafana" / "dashboards" / "linocut.json").read_text())
    panels = []
    row = ""
    for panel in board["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        queries = []
        for target in panel["targets"]:
            # Grafana's rule: at least four scrapes.
            expression = target["expr"].replace("$__rate_interval", f"{8 * SCRAPE}s")
            expression = re.sub(r"\$(model|instance)\b", ".+", expression)
            given = {"query": expression, "start": began, "end": ended, "step": SCRAPE}
            answer = httpx.get(f"{url}/api/v1/query_range", params=given, timeout=30).json()
            if answer["status"] != "success":
                raise RuntimeError(f"{panel['title']}: {answer}")
            queries.append({"query": expression, "legend": target["legendFormat"], "series": answer["data"]["result"]})
        unit = panel["fieldConfig"]["defaults"]["unit"]
        panels.append({"row": row, "title": panel["title"], "type": panel["type"], "unit": unit, "queries": queries})
    return panels


def has_data(query: dict[str, Any]) -> bool:
    return any(math.isfinite(float(value)) for series in query["series"] for _, value in series["values"])


def ask_rules(url: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/rules", timeout=30).json()
    return [rule for group in answer["data"]["groups"] for rule in group["rules"]]
