"""Clients of one scenario, run by Locust. Imported first of all: gevent patches the sockets of everything else."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import gevent
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser
from requests import post

from .samples import Sample
from .scenarios import Scenario


def run_level(
    scenario: Scenario,
    level: float,
    url: str,
    model: str,
    offered: list[str],
    seconds: float,
    key: str | None,
    warm: bool = False,
) -> list[Sample]:
    """Samples of all requests that began within `seconds`; those that run then are waited for. warm: other prompts."""
    samples: list[Sample] = []
    began = time.monotonic()
    deadline = began + seconds
    rng = random.Random(f"{scenario.name}/{level}/{warm}")

    class Client(User):
        host = url

        @task
        def work(self) -> None:
            if time.monotonic() >= deadline:
                raise StopUser
            if scenario.arrivals == "closed":
                self.ask()
                return
            running = []
            while time.monotonic() < deadline:
                running.append(gevent.spawn(self.ask))
                gevent.sleep(rng.expovariate(level))
            gevent.joinall(running)

        def ask(self) -> None:
            body = scenario.body(rng, model, offered)
            patience = rng.uniform(0.1, 2.0) if rng.random() < scenario.hang_up else None
            sample = _ask(self, body, patience, key, began)
            samples.append(sample)
            self.environment.events.request.fire(
                request_type="completion", name=scenario.name, response_time=sample.seconds * 1000,
                response_length=sample.tokens, exception=sample.error, context={},
            )  # fmt: skip

    environment = Environment(user_classes=[Client])
    runner = environment.create_local_runner()
    users = int(level) if scenario.arrivals == "closed" else 1
    runner.start(users, spawn_rate=users)
    while runner.user_count or time.monotonic() < deadline:
        gevent.sleep(0.05)
    runner.quit()
    return samples


def _ask(user: User, body: dict[str, Any], patience: float | None, key: str | None, began: float) -> Sample:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    now = time.monotonic()
    sample = Sample(now - began, None, 0.0, 0)
    done = False
    try:
        # Not Locust's client, whose statistics take the headers' arrival for the answer's.
        url = f"{user.host}/v1/completions"
        with post(url, json=body, headers=headers, stream=True, timeout=600) as response:
            if response.status_code != 200:
                sample.error = f"{response.status_code} {response.text[:200]}"
            for line in response.iter_lines(chunk_size=None) if sample.error is None else ():
                if patience is not None and time.monotonic() - now > patience:
                    sample.hung_up = True
                    break
                done = _read(line, sample, now) or done
    except Exception as error:  # connection errors of several libraries; all of them are a failed request
        sample.error = repr(error)[:200]
    sample.seconds = time.monotonic() - now
    if sample.error is None and not done and not sample.hung_up:
        sample.error = "the stream ended early"
    return sample


def _read(line: bytes, sample: Sample, asked: float) -> bool:
    """Take in one line of the stream of what was asked then; true if it is the last event."""
    if not line.startswith(b"data: "):
        return False
    if line == b"data: [DONE]":
        return True
    event = json.loads(line[6:])
    if "error" in event:
        sample.error = str(event["error"])[:200]
        return False
    if sample.first is None and any(choice.get("text") for choice in event["choices"]):
        sample.first = time.monotonic() - asked
    if event.get("usage"):
        sample.tokens = event["usage"]["completion_tokens"]
    return False
