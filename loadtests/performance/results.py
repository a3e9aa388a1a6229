"""The rows of all sheets of a run, to be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .sheet import Row, read_sheets

# How tables call what a task decodes; its mode says the rest.
LABELS = {
    "fast-dllm-v2": "7B as Fast-dLLM v2",
    "sdar-4": "7B as SDAR",
    "sdar-8": "7B as SDAR",
    "converted": "7B, converted",
    "embedded": "embedded model",
}
_OF_HEAD = ("task", "engine", "floor_ms", "copy_GBps", "block")


class Results:
    """Rows that were measured, each with what its sheet's head says of it; and the reasons why others were not."""

    def __init__(self, sheets: list[Row]) -> None:
        self.sheets = sheets
        self.rows: list[Row] = []
        self.failed: list[Row] = []
        for sheet in sheets:
            head = {key: sheet[key] for key in _OF_HEAD if key in sheet}
            head["label"] = LABELS.get(sheet["task"], sheet["task"])
            for row in sheet["rows"]:
                # Of an earlier sitting, in a sheet that was put together by hand.
                sitting = row.get("sitting", sheet.get("sitting"))
                label = head["label"] if sitting is None else f"{head['label']} ({sitting})"
                (self.failed if "error" in row else self.rows).append({**head, **row, "label": label})

    @classmethod
    def read(cls, folder: Path) -> Results:
        return cls(read_sheets(folder))

    def find(self, point: str, **keys: Any) -> list[Row]:
        """Our own rows of a point that have these values, in the order in which they were measured."""
        return [
            row
            for row in self.rows
            if row["point"] == point
            and row["engine"] == "linocut"
            and all(row.get(key) == value for key, value in keys.items())
        ]

    def peer(self, point: str, task: str, asked: int) -> Row | None:
        """vLLM's row of a point."""
        for row in self.rows:
            if row["engine"] != "linocut" and (row["point"], row["task"], row["asked"]) == (point, task, asked):
                return row
        return None
