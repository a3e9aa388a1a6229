"""The ASGI application of one server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from . import chat, completions, models, openapi, operations, tokens
from .api_errors import install_handlers
from .gateway import Gateway
from .service import Service


def create_app(service: Service) -> FastAPI:
    # FastAPI's own description would not show the types that bodies are parsed with; openapi.py's does.
    # Spans are `tracing.py`'s: FastAPI's own would be second ones, and asking whether anybody wants them takes a tenth
    # of a request's time. Versions that have none ignore it.
    telemetry: Any = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(
        title="Linocut", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, telemetry=telemetry
    )
    app.state.service = service
    for module in (chat, completions, models, tokens, operations, openapi):
        app.include_router(module.router)
    install_handlers(app)
    app.add_middleware(Gateway, service=service)
    return app
