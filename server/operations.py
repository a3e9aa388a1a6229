"""Probes and metrics for operators: /health, /ready, /version, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from .json_response import json_response
from .service import service_of
from .version import package_version

router = APIRouter()
PROBES = ("/health", "/ready", "/version", "/metrics")


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """200 while the engine lives; a server that drains is healthy."""
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
