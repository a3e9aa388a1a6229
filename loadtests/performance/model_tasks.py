"""The embedded model with its real weights: in this process, and behind the server."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linocut.engine.bench.chat import read_chat, read_conversations
from linocut.engine.bench.closed_loop import run_clients
from linocut.engine.bench.prefill import measure_prefill
from linocut.engine.bench.run import machine
from linocut.engine.config import EngineConfig
from linocut.engine.core import EngineCore
from linocut.engine.decoding.parameters import resolve
from linocut.engine.loading import load_model
from linocut.engine.models.source import resolve_model
from linocut.engine.warm_up import warm_up

from ..serving import served
from .settings import Settings
from .sheet import Sheet
from .streams import run_streams

STRATEGIES: dict[str, dict[str, Any]] = {
    "verify": {"strategy": "verify"},
    "autoregressive": {"strategy": "autoregressive"},
    "threshold 0.7": {"strategy": "threshold", "threshold": 0.7},
}
# Prompt and answer; MT-bench's longest question takes a third of it.
MAX_MODEL_LEN = 1024
# What the vLLM peer is given, so that both answer the same prompts.
PROMPTS = "prompts.ids"


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
    for name, asked in STRATEGIES.items():
        decoding = resolve(core.info, asked)
        if core.runner.graphs is not None:
            warm_up(core, decoding, tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max(settings.clients)))
        if name == "autoregressive" and "prefill" in settings.parts:
            for count in settings.prefills:

                def prefill(count: int = count) -> dict[str, Any]:
                    found = measure_prefill(core, decoding, count, settings.prompt)
                    return {**asdict(found), "tokens_per_second": found.tokens_per_second}

                sheet.attempt(prefill, point="prefill", mode=name, asked=count)
        for clients in settings.clients if "clients" in settings.parts else ():

            def measure(clients: int = clients) -> dict[str, Any]:
                requests = settings.asked(clients)
                # Shapes that only this load has are met before they are timed.
                run_clients(core, decoding, chat.ids, clients, requests, settings.tokens // 4)
                found = run_clients(core, decoding, chat.ids, clients, requests, settings.tokens)
                return {
                    **asdict(found),
                    "tokens_per_second": found.tokens_per_second,
                    "tokens_per_forward": found.tokens / max(found.forwards, 1),
                }

            sheet.attempt(measure, point="clients", mode=name, asked=clients)
    sheet.note(finished=True)


def run_http(settings: Settings, path: Path, deadline: float) -> None:
    """The same behind the server, on loopback: streaming clients in processes of their own."""
    assert settings.prompts is not None
    sheet = Sheet(path, {"task": "http", "engine": "linocut", "machine": machine()}, deadline)
    options = ["--max-running", str(max(settings.clients)), "--max-model-len", str(MAX_MODEL_LEN)]
    options += ["--no-prefix-caching", "--device", settings.device, "--log-level", "warning"]
    folder = str(resolve_model(settings.model))
    sheet.note(settings=settings.as_dict(), processors=os.cpu_count())
    prompts = read_conversations(settings.prompts)
    with served(None, folder, "--served-model-name", "it", *options) as server:
        for name, asked in STRATEGIES.items():
            body = {"model": "it", "temperature": 0, "max_tokens": settings.tokens, "diffusion": asked}
            bodies = [{**body, "messages": messages} for messages in prompts]
            short = [{**body, "max_tokens": settings.tokens // 4} for body in bodies]
            for clients in settings.clients:

                def measure(
                    clients: int = clients, bodies: list[Any] = bodies, short: list[Any] = short
                ) -> dict[str, Any]:
                    requests = settings.asked(clients)
                    run_streams(server.url, short, clients, requests)
                    return run_streams(server.url, bodies, clients, requests).as_dict()

                sheet.attempt(measure, point="http", mode=name, asked=clients)
    sheet.note(finished=True)


