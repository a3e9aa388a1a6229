"""For operators: /health, /ready, /version, /metrics, /server_info."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import structs
from prometheus_client import CONTENT_TYPE_LATEST

from .json_response import json_response
from .service import service_of
from .version import package_version

router = APIRouter()
PROBES = ("/health", "/ready", "/version", "/metrics")


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """200 while an engine lives or comes back; a server that drains is healthy."""
    if service_of(request).engine.dead.is_set():
        return json_response({"status": "engine dead"}, 503)
    return json_response({"status": "ok"})


@router.api_route("/ready", methods=["GET", "HEAD"])
async def ready(request: Request) -> Response:
    """200 while new work is welcome."""
    if service_of(request).ready:
        return json_response({"status": "ready"})
    return json_response({"status": "not ready"}, 503)


@router.get("/version")
async def version() -> Response:
    return json_response({"version": package_version()})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/server_info")
async def server_info(request: Request) -> Response:
    """What was asked for and what came of it; no secrets. Asks for a key where there are keys."""
    service = service_of(request)
    hidden = {"api_keys", "api_key_file"}
    server = {name: value for name, value in vars(service.settings).items() if name not in hidden}
    resolved = {name: value for name, value in structs.asdict(service.model).items() if name != "strategy_table"}
    return json_response(
        {
            "versions": versions(),
            "uptime_seconds": round(time.monotonic() - service.started),
            "server": {**server, "keys": None if service.keys.open else len(service.keys)},
            "engine": service.configuration,
            "engines": [
                {"alive": engine.alive, "device": engine.model.device, "in_flight": engine.in_flight}
                for engine in service.engine.engines
            ],
            "model": {**resolved, "strategies": service.model.strategies},
        }
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that results and speed depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("linocut", "torch", "triton", "transformers", "tokenizers", "fastapi", "uvicorn", "pyzmq"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
