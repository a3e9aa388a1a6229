"""The installed version."""

from __future__ import annotations

import importlib.metadata


def package_version() -> str:
    try:
        return importlib.metadata.version("linocut")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
