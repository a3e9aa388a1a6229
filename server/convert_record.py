"""What each stage of `linocut convert run` was made with, kept beside its result.

A stage that is complete is not made again; so that it is not taken for what the command asks for now either, its
settings and inputs are compared. A stage's result has an id: what was made of an earlier one is told by it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linocut.engine.errors import ConfigError

FILE = "made_with.json"
# Fields of settings that are told as inputs, or that say how a stage works and not what it makes.
_APART = {
    *("model", "base", "out", "output", "run", "data", "prompts", "exclude"),
    *("devices", "processes", "max_running", "progress", "device", "compile", "peak_tflops"),
    *("session_seconds", "checkpoint_seconds", "evaluate_seconds", "log_every"),
}


class Record:
    """Of one stage. folders: what a user deletes to make it again; the first one holds the record."""

    def __init__(self, stage: str, folders: Sequence[Path], settings: Any, inputs: dict[str, Any]) -> None:
        """settings: a dataclass, or a dict of options. inputs: what the stage reads, each by what names its content."""
        kept = settings
        if not isinstance(settings, dict):
            kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _APART}
        self._stage, self._folders = stage, folders
        self._made: dict[str, Any] = json.loads(json.dumps({"settings": kept, "inputs": inputs}, default=str))

    def write(self) -> None:
        """The stage is made with these from here on."""
        path = self._folders[0] / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{FILE}.partial")
        part.write_text(json.dumps({"id": uuid.uuid4().hex, **self._made}, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)

    def differences(self) -> list[str] | None:
        """What was other when the stage was made; None if nobody wrote it down."""
        found = _read(self._folders[0])
        if not found:
            return None
        told = []
        old, new = found["settings"], self._made["settings"]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                told.append(f"{name} {_brief(old.get(name))} (not {_brief(new.get(name))})")
        old, new = found["inputs"], self._made["inputs"]
        return told + [f"other {name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]

    def check(self) -> str:
        """What to say of the complete stage. Raises ConfigError if it was made with other settings or inputs."""
        found = self.differences()
        if found is None:
            return f"complete (there is no {FILE}: it may be of other settings)"
        if found:
            folders = " and ".join(str(folder) for folder in self._folders)
            raise ConfigError(
                f"the {self._stage} stage is complete, but was made with {', '.join(found)}: "
                f"name another OUT folder, or delete {folders} to make it again"
            )
        return "complete"


def result_id(folder: Path) -> str | None:
    """Names what the stage with its record in `folder` has made; None without a record."""
    return _read(folder).get("id")


def describe_model(folder: Path) -> dict[str, Any]:
    """A model as an input: the name of its folder and the size of its weights."""
    weights = folder.glob("model*.safetensors")
    return {"name": folder.resolve().name, "bytes": sum(path.stat().st_size for path in weights)}


def describe_files(paths: Sequence[Path]) -> list[Any]:
    """Files as an input, wherever they lie: names and sizes, of a folder those of what it holds."""
    found = [sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] for path in paths]
    return [[path.name, path.stat().st_size] for files in found for path in files if path.is_file()]


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return found if {"id", "settings", "inputs"} <= found.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
