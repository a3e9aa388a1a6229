"""GET /openapi.json: the API in OpenAPI 3.1, derived from the types that bodies are parsed with."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import Response

from .json_response import json_response
from .requests import ChatRequest, CompletionRequest, Conversation, DetokenizeRequest, TokenizeChat, TokenizeText
from .version import package_version

router = APIRouter()

_BODIES = (ChatRequest, Conversation, CompletionRequest, TokenizeText, TokenizeChat, DetokenizeRequest)
_REFUSALS = {
    400: "The request is invalid; `param` names what is to blame.",
    401: "No API key, or a wrong one.",
    404: "The model does not exist.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The key's own limits; see Retry-After.",
    503: "The queue is full, the server is shutting down, or the engine is gone.",
}


class ErrorDetails(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """What every refusal and failure looks like."""

    error: ErrorDetails


@router.get("/openapi.json")
async def openapi() -> Response:
    return json_response(schema())


@cache
def schema() -> dict[str, Any]:
    _, components = msgspec.json.schema_components((*_BODIES, ErrorBody), ref_template="#/components/schemas/{name}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Linocut", "version": package_version()},
        "paths": {
            "/v1/chat/completions": _post("Answer a conversation", "allOf", "ChatRequest", "Conversation", stream=True),
            "/v1/completions": _post("Continue a prompt", "allOf", "CompletionRequest", stream=True),
            "/tokenize": _post("The tokens of a text or a conversation", "anyOf", "TokenizeText", "TokenizeChat"),
            "/detokenize": _post("The text of tokens", "allOf", "DetokenizeRequest"),
            "/v1/models": _get("The served names", 401, 429),
            "/v1/models/{name}": {
                **_get("One served name", 401, 404, 429),
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
            },
            "/server_info": _get("The resolved configuration", 401, 429),
            "/health": _get("Whether the engine lives", 503),
            "/ready": _get("Whether new work is welcome", 503),
            "/version": _get("The version"),
            "/metrics": _get("Prometheus metrics", media="text/plain"),
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(summary: str, combine: str, *bodies: str, stream: bool = False) -> dict[str, Any]:
    body = {combine: [{"$ref": f"#/components/schemas/{name}"} for name in bodies]}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"200": {"description": "OK", "content": content}, **_refusals(*_REFUSALS)},
        }
    }


def _get(summary: str, *refusals: int, media: str = "application/json") -> dict[str, Any]:
    kind = {"type": "object"} if media == "application/json" else {"type": "string"}
    ok = {"description": "OK", "content": {media: {"schema": kind}}}
    return {"get": {"summary": summary, "responses": {"200": ok, **_refusals(*refusals)}}}


def _refusals(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {str(status): {"description": _REFUSALS.get(status, "Not now."), "content": content} for status in statuses}
