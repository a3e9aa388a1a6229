"""The embedded model with its real weights: in this process, and behind the server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from linocut.engine.bench.chat import read_chat
from linocut.engine.bench.closed_loop import ClosedLoop, run_clients
from linocut.engine.bench.prefill import measure_prefill
from linocut.engine.bench.run import machine
from linocut.engine.config import EngineConfig
from linocut.engine.core import EngineCore
from linocut.engine.decoding.parameters import resolve
from linocut.engine.loading import load_model
from linocut.engine.models.source import resolve_model
from linocut.engine.params import DecodingParams

from ..serving import Served, served
from .settings import Settings
from .sheet import Row, Sheet
from .streams import Streamed, run_streams

STRATEGIES: dict[str, dict[str, Any]] = {
    "verify": {"strategy": "verify"},
    "autoregressive": {"strategy": "autoregressive"},
    "threshold 0.7": {"strategy": "threshold", "threshold": 0.7},
}
# Prompt and answer; MT-bench's longest question takes a third of it.
MAX_MODEL_LEN = 1024
# At most, until one captures no step any more: that takes as long as some fifty of them.
_REHEARSALS = 4
Found = TypeVar("Found")
# What the vLLM peer is given, so that both answer the same prompts.
PROMPTS = "prompts.ids"


def _valid(names: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """Those that a model has."""
    return [(name, asked) for name, asked in STRATEGIES.items() if asked["strategy"] in names]


def run_offline(settings: Settings, path: Path, deadline: float) -> None:
    """The engine in this process, and the prompts that it is asked, beside the sheet, for others."""
    assert settings.prompts is not None
    folder = resolve_model(settings.model)
    sheet = Sheet(path, {"task": "embedded", "engine": "linocut", "machine": machine()}, deadline)
    config = EngineConfig(
        model=str(folder),
        device=settings.device,
        max_running=max(settings.clients),
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=False,
    )
    core = EngineCore(load_model(config))
    chat = read_chat(settings.prompts, folder, 1000, MAX_MODEL_LEN - settings.tokens)
    path.with_name(PROMPTS).write_text(json.dumps({"tokens": settings.tokens, "ids": chat.ids}))
    sheet.note(settings=settings.as_dict(), prompts=chat.as_dict(), cuda_graphs=core.runner.graphs is not None)
    for name, asked in _valid(core.info.strategies):
        decoding = resolve(core.info, asked)
        if name == "autoregressive" and "prefill" in settings.parts:
            for count in settings.prefills:
                measure = partial(_prefill, core, decoding, settings, count)
                sheet.attempt(measure, point="prefill", mode=name, asked=count)
        for count in settings.clients if "clients" in settings.parts else ():
            measure = partial(_answers, core, decoding, settings, chat.ids, count)
            sheet.attempt(measure, point="clients", mode=name, asked=count)
    sheet.note(finished=True)


def _prefill(core: EngineCore, decoding: DecodingParams, settings: Settings, count: int) -> Row:
    found = measure_prefill(core, decoding, count, settings.prompt)
    return {**asdict(found), "tokens_per_second": found.tokens_per_second}


def _answers(
    core: EngineCore, decoding: DecodingParams, settings: Settings, prompts: list[list[int]], clients: int
) -> Row:
    def run() -> ClosedLoop:
        return run_clients(core, decoding, prompts, clients, settings.asked(clients), settings.tokens)

    with core.runner.learning():  # of all shapes that the timed ones meet
        run()
    found, captures = _rehearsed(run, lambda: core.stats().graph_captures)
    per_forward = found.tokens / max(found.forwards, 1)
    speeds = {"tokens_per_second": found.tokens_per_second, "tokens_per_forward": per_forward}
    return {**asdict(found), **speeds, "captures": captures}


def run_http(settings: Settings, path: Path, deadline: float) -> None:
    """The same behind the server, on loopback: streaming clients in processes of their own."""
    assert settings.prompts is not None
    sheet = Sheet(path, {"task": "http", "engine": "linocut", "machine": machine()}, deadline)
    options = ["--max-running", str(max(settings.clients)), "--max-model-len", str(MAX_MODEL_LEN)]
    options += ["--no-prefix-caching", "--device", settings.device, "--log-level", "warning"]
    if settings.model is None:
        # Offline all of them are made ready, too.
        options += ["--warm-up", ",".join(str(asked["strategy"]) for asked in STRATEGIES.values())]
    folder = str(resolve_model(settings.model))
    sheet.note(settings=settings.as_dict(), processors=os.cpu_count())
    chat = read_chat(settings.prompts, Path(folder), 1000, MAX_MODEL_LEN - settings.tokens)
    with served(None, folder, "--served-model-name", "it", *options) as server:
        card = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]
        for name, asked in _valid(card["diffusion"]["strategies"]):
            body = {"model": "it", "temperature": 0, "max_tokens": settings.tokens, "diffusion": asked}
            bodies = [{**body, "messages": messages} for messages in chat.messages]
            for count in settings.clients:
                measure = partial(_streams, server, bodies, settings, count)
                sheet.attempt(measure, point="http", mode=name, asked=count)
    sheet.note(finished=True)


def _streams(server: Served, bodies: list[Row], settings: Settings, clients: int) -> Row:
    def run() -> Streamed:
        return run_streams(server.url, bodies, clients, settings.asked(clients))

    found, captures = _rehearsed(run, lambda: int(server.metrics()["linocut_graph_captures_total"]))
    return {**found.as_dict(), "captures": captures}


def _rehearsed(run: Callable[[], Found], captured: Callable[[], int]) -> tuple[Found, int]:
    """What `run` finds once it has met all its shapes of steps, or most of them; and how many it captured then.

    captured: how many graphs have been, so far.
    """
    for _ in range(_REHEARSALS):
        before = captured()
        run()
        if captured() == before:
            break
    before = captured()
    return run(), captured() - before
