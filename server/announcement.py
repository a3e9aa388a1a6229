"""What the server prints when it is ready: its configuration, its URL, and a request to try."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import msgspec

from .logs import log_event
from .service import Service

log = logging.getLogger("linocut.server")


def announce(service: Service, url: str) -> None:
    model = msgspec.structs.asdict(service.model)
    hidden = {"stop_ids", "banned_ids", "strategy_table", "default_strategy", "default_parameters"}
    lines = {name: value for name, value in model.items() if name not in hidden and value not in ({}, ())}
    lines["strategies"] = ", ".join(service.model.strategies)
    defaults = " ".join(f"{name}={value}" for name, value in service.model.default_parameters.items())
    lines["strategy"] = f"{service.model.default_strategy} {defaults}".strip()
    if service.settings.replicas > 1:
        lines["engines"] = service.settings.replicas
    lines["served as"] = ", ".join(service.settings.served_names)
    lines["api keys"] = "none: everyone who reaches the port may use it" if service.keys.open else len(service.keys)
    if service.settings.log_format == "json":
        log_event(log, logging.INFO, "ready", "ready", {"url": f"{url}/v1", **lines})
        return
    width = max(map(len, lines))
    print("\nLinocut is ready.\n", file=sys.stderr)
    for name, value in lines.items():
        print(f"  {name.replace('_', ' '):<{width}}  {value}", file=sys.stderr)
    print(f"\n  {url}/v1\n\n{_curl(service, url)}\n", file=sys.stderr, flush=True)


def _curl(service: Service, url: str) -> str:
    key = ' -H "Authorization: Bearer $LINOCUT_API_KEY"' if not service.keys.open else ""
    name = service.settings.served_names[0]
    chat = service.chats and service.tokenizer is not None and service.tokenizer.template is not None
    body: dict[str, Any]
    if chat:
        path, body = "chat/completions", {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
    else:
        prompt = "Once upon a time" if service.tokenizer is not None else [0]
        path, body = "completions", {"model": name, "prompt": prompt, "max_tokens": 64}
    text = json.dumps(body).replace("'", "'\\''")
    return f"  curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{text}'"
