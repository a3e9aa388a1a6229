"""Results in a file that is whole after every row: what ends a run early costs no row that was measured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Sheet:
    """One file of rows. head: what all of them have in common. deadline: of `time.monotonic`, no row begins later."""

    def __init__(self, path: Path, head: Row, deadline: float = float("inf")) -> None:
        self.path, self._deadline = path, deadline
        self.head = head
        self.rows: list[Row] = []
        self.failures = 0
        self._write()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self._write()
        print(json.dumps(row), flush=True)

    def attempt(self, measure: Callable[[], Row], **keys: Any) -> None:
        """Add the row that `measure` returns, with `keys`; why there is none, where it fails or the time is up.

        After three failures one after another nothing is tried any more: a GPU that failed once may stay so.
        """
        if self.failures >= 3 or time.monotonic() > self._deadline:
            self.add(**keys, error="not tried: out of time" if self.failures < 3 else "not tried: others failed")
            return
        began = time.monotonic()
        try:
            row = measure()
        except Exception as error:  # whatever it is, the other rows are wanted
            self.failures += 1
            self.add(**keys, error=f"{type(error).__name__}: {error}"[:400])
            return
        self.failures = 0
        self.add(**keys, **row, took_s=round(time.monotonic() - began, 2))

    def note(self, **facts: Any) -> None:
        self.head |= facts
        self._write()

    def _write(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        lines = ",\n".join("  " + json.dumps(_rounded(row)) for row in self.rows)
        head = json.dumps(self.head, indent=1)[:-2]
        partial.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
        os.replace(partial, self.path)


def _rounded(value: Any) -> Any:
    """Five digits of measured numbers are more than they mean."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_sheets(folder: Path) -> list[Row]:
    """All sheets of a folder, in the order of their names. A sheet is its head with `rows`."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
