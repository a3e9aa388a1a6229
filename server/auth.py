"""Bearer keys: hashed once, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac

from .api_errors import Unauthorized

GUARDED_PATHS = ("/tokenize", "/detokenize")
GUARDED_PREFIX = "/v1"


class KeyRing:
    """The accepted API keys; an empty ring lets everyone in."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def guards(self, path: str) -> bool:
        if not self._digests:
            return False
        return path == GUARDED_PREFIX or path.startswith(f"{GUARDED_PREFIX}/") or path in GUARDED_PATHS

    def check(self, authorization: bytes | None) -> None:
        """Raise 401 unless the header carries one of the keys. Every key is compared, whichever matches."""
        scheme, _, key = (authorization or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "invalid API key" if authorization else "no API key: send Authorization: Bearer <key>"
            raise Unauthorized(message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
