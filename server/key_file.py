"""The file of API keys: TOML, a table for each holder.

    [alice]
    key = "sk-…"                  # or sha256 = "…", the hexadecimal digest of the key
    requests_per_minute = 60
    tokens_per_minute = 100000    # of prompts and answers together
    concurrent_requests = 8

Limits that are left out do not exist.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from linocut.engine.errors import ConfigError

from .quota import Limits

_NAME = re.compile(r"[A-Za-z0-9_.@+-]{1,64}")

Rate = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class KeyEntry:
    """digest: the sha256 of the key; the key itself is not kept."""

    name: str
    digest: bytes
    limits: Limits


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Annotated[str, Meta(min_length=8, pattern="^[!-~]*$")] | None = None
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    concurrent_requests: Annotated[int, Meta(ge=1)] | None = None


def read_key_file(path: Path) -> list[KeyEntry]:
    """The file's entries. Raises ConfigError, which never quotes a key."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    entries = [_entry(path, name, table) for name, table in tables.items()]
    digests = {entry.digest: entry.name for entry in entries}
    for entry in entries:
        if digests[entry.digest] != entry.name:
            raise ConfigError(f"{path}: {entry.name} and {digests[entry.digest]} have the same key")
    return entries


def _entry(path: Path, name: str, raw: object) -> KeyEntry:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: a name has 1 to 64 letters, digits or _.@+-")
    try:
        table = msgspec.convert(raw, _Table)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {name}: {error}") from None
    if (table.key is None) == (table.sha256 is None):
        raise ConfigError(f"{path}: {name}: either key or sha256")
    digest = hashlib.sha256(table.key.encode()).digest() if table.key else bytes.fromhex(table.sha256 or "")
    return KeyEntry(name, digest, Limits(table.requests_per_minute, table.tokens_per_minute, table.concurrent_requests))
