"""The run's log: one JSON object a line, and a line of progress for whoever watches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Journal:
    """log.jsonl and a progress bar, in the leading process only."""

    def __init__(self, path: Path, active: bool) -> None:
        self._file = path.open("a", encoding="utf-8") if active else None
        columns = (
            TextColumn("adapt"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        console = Console(stderr=True)
        self._console = console
        self._bar = Progress(*columns, console=console, disable=not active or not console.is_terminal)
        self._task = self._bar.add_task("adapt", total=1.0, note="compiling")
        self._plain = active and not console.is_terminal
        self._bar.start()

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append a record. `kind`: "start", "train", "held-out" or "end"."""
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, **record}) + "\n")
        self._file.flush()
        if self._plain or kind != "train":
            self._console.print(f"{kind}: {_brief(record)}", highlight=False)

    def advance(self, share: float, record: dict[str, Any]) -> None:
        """Move the bar to `share` of the run and show what matters of `record`."""
        self._bar.update(self._task, completed=share, note=_brief(record))

    def close(self) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()


_SHOWN = ("step", "seconds", "tokens", "loss", "draft_ce", "denoise_ce", "draft_expected", "accepted", "head_accepted")


def _brief(record: dict[str, Any]) -> str:
    parts = [f"{name} {record[name]}" for name in (*_SHOWN, "ar_kl", "tokens_per_second", "mfu") if name in record]
    first = record.get("draft_accuracy", [])[:4]
    return "  ".join([*parts, *([f"accuracy {first}"] if first else [])])
