"""Who may ask: Bearer keys from options and from a file that may change while we serve."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from linocut.engine.errors import ConfigError

from .api_errors import Unauthorized
from .key_file import read_key_file
from .quota import Limits, Quota

log = logging.getLogger("linocut.server")

GUARDED_PATHS = ("/tokenize", "/detokenize", "/server_info")
GUARDED_PREFIX = "/v1"


@dataclass(frozen=True)
class Caller:
    """A holder of a key. name: for logs; of a key without one, the beginning of its sha256."""

    name: str
    quota: Quota


class KeyRing:
    """The accepted API keys, by sha256; without keys and without a file everyone is let in.

    Keys are looked up by their digest: what the time of a look-up tells of a digest says nothing of its key.
    """

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        """Raises ConfigError if the file cannot be used."""
        self._file = file
        self._fixed: dict[bytes, Caller] = {}
        for key in keys:
            digest = hashlib.sha256(key.encode()).digest()
            self._fixed[digest] = Caller(f"sha256:{digest.hex()[:8]}", Quota(Limits()))
        self._callers = dict(self._fixed)
        self._seen = self._stamp()
        if file is not None:
            self._load(file)

    def __len__(self) -> int:
        return len(self._callers)

    @property
    def open(self) -> bool:
        """Whether no key is asked for. An empty file lets nobody in."""
        return not self._callers and self._file is None

    def guards(self, path: str) -> bool:
        if self.open:
            return False
        return path == GUARDED_PREFIX or path.startswith(f"{GUARDED_PREFIX}/") or path in GUARDED_PATHS

    def check(self, authorization: bytes | None) -> Caller:
        """The holder of the header's key. Raises 401."""
        scheme, _, key = (authorization or b"").partition(b" ")
        caller = self._callers.get(hashlib.sha256(key.strip()).digest())
        if scheme.lower() != b"bearer" or caller is None:
            message = "invalid API key" if authorization else "no API key: send Authorization: Bearer <key>"
            raise Unauthorized(message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return caller

    def refresh(self, force: bool = False) -> None:
        """Read the file again if it has changed. A file that cannot be used changes nothing, and is logged."""
        if self._file is None:
            return
        stamp = self._stamp()
        if stamp == self._seen and not force:
            return
        self._seen = stamp
        try:
            self._load(self._file)
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("%d API keys are accepted from now on", len(self))

    def _load(self, file: Path) -> None:
        quotas = {caller.name: caller.quota for caller in self._callers.values()}
        found: dict[bytes, Caller] = {}
        for entry in read_key_file(file):
            # What a caller has used up stays used up.
            quota = quotas.get(entry.name) or Quota(entry.limits)
            quota.limits = entry.limits
            found[entry.digest] = Caller(entry.name, quota)
        self._callers = self._fixed | found

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes with the file: by writing, by replacing, or by pointing a link elsewhere."""
        if self._file is None:
            return None
        try:
            status = os.stat(self._file)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
