"""JSON bodies, encoded by msgspec: several times faster than the standard library on long lists of token ids."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi.responses import Response

encode = msgspec.json.Encoder().encode


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(content), status, headers=headers, media_type="application/json")
