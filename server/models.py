"""GET /v1/models and /v1/models/{id}: the one model, under each of its served names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .json_response import json_response
from .service import Service, service_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    service = service_of(request)
    return json_response({"object": "list", "data": [_card(service, name) for name in service.settings.served_names]})


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    service = service_of(request)
    return json_response(_card(service, service.resolve_model(name)))


def _card(service: Service, name: str) -> dict[str, Any]:
    model = service.model
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "linocut",
        "root": service.settings.served_names[0],
        "parent": None,
        "max_model_len": model.max_model_len,
        "permission": [],
        "diffusion": {
            "family": model.family,
            "block_size": model.block_size,
            "strategies": list(model.strategies),
            "default_strategy": model.default_strategy,
            "default_parameters": model.default_parameters,
        },
    }
