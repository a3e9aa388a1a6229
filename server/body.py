"""The body of a request: read within a limit, parsed as one JSON object, converted to a message type."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from .api_errors import BadRequest, PayloadTooLarge, RequestTimeout, UnsupportedMediaType, clip

T = TypeVar("T")

_decode = msgspec.json.Decoder().decode
_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")


async def read_object(request: Request, limit: int, timeout: float) -> dict[str, Any]:
    """The request's JSON object. Raises 400, 408, 413 or 415; Starlette's ClientDisconnect if the client left."""
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        # Also keeps web pages from posting to a local server: browsers ask first for this media type.
        raise UnsupportedMediaType("send Content-Type: application/json")
    try:
        async with asyncio.timeout(timeout):
            raw = await _read(request, limit)
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {timeout:g} s") from None
    return parse_object(raw)


async def _read(request: Request, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    # A client that is still writing cannot read our answer: take in, and drop, a body somewhat over the limit.
    drop_until = 4 * limit
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > drop_until:
        raise PayloadTooLarge(f"the body exceeds {limit} bytes")
    async for piece in request.stream():
        size += len(piece)
        if size > drop_until:
            break
        if size <= limit:
            pieces.append(piece)
        else:
            pieces.clear()
    if size > limit:
        raise PayloadTooLarge(f"the body exceeds {limit} bytes")
    return b"".join(pieces)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Strict JSON (RFC 8259, UTF-8, no NaN, no lone surrogates) whose top is an object."""
    try:
        value = _decode(raw)
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid UTF-8") from None
    except msgspec.MsgspecError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def convert(value: dict[str, Any], kind: type[T]) -> T:
    """`value` as a message type, strictly: no boolean is a number, no string is one. Raises 400 naming the field."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        message = str(error)
        found = _PATH.search(message)
        path = found["path"] if found else ""
        message = clip(message[: found.start()] if found else message, 200)
        if missing := _MISSING.match(message):
            path = f"{path}.{missing['name']}" if path else missing["name"]
        raise BadRequest(f"{clip(path)}: {message}" if path else message, param=path or None) from None
