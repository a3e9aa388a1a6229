"""What a generating run tells: a progress bar on standard error and JSON lines in a file."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Seconds between progress lines of the file.
INTERVAL = 5.0
# Of the counts, what has become of prompts that were taken up.
SETTLED = (
    "answers",
    "truncated dropped",
    "looping",
    "empty",
    "refused",
    "prompt too long",
    "self-prompt unusable",
)


class GenerateLog:
    """Use as a context. Rates are those of the time since the log's last line, so that they follow what happens."""

    def __init__(self, path: Path, progress: bool) -> None:
        self._file = path.open("a", encoding="utf-8")
        columns = (
            TextColumn("generate"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]:.2f}M tokens, {task.fields[rate]:,.0f}/s"),
            TimeElapsedColumn(),
        )
        self._console = Console(stderr=True)
        self._bar = Progress(*columns, console=self._console, disable=not (progress and self._console.is_terminal))
        # A log that nobody redraws gets a line now and then instead.
        self._plain = progress and not self._console.is_terminal
        self._task = self._bar.add_task("generate", total=None, tokens=0.0, rate=0.0)
        self._before = 0
        self._last = (time.monotonic(), 0)
        self._rate = 0.0

    def __enter__(self) -> GenerateLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()

    def event(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": kind, "time": round(time.time(), 3), **fields}) + "\n")
        self._file.flush()

    def expect(self, prompts: int, tokens: int) -> None:
        """`prompts` are to be answered; `tokens` are there from earlier runs."""
        self._before = tokens
        self._bar.update(self._task, total=prompts)

    def progress(self, counts: Counter[str], seconds: float) -> None:
        now, tokens = time.monotonic(), counts["answer tokens"]
        since, before = self._last
        if now - since >= INTERVAL:
            self._rate = (tokens - before) / (now - since)
            self._last = (now, tokens)
            self.event("progress", seconds=round(seconds, 1), tokens_per_second=round(self._rate, 1), **counts)
            if self._plain:
                answers, total = counts["answers"], (self._before + tokens) / 1e6
                text = f"generate: {answers} answers, {total:.2f}M tokens, {self._rate:,.0f}/s, {seconds:.0f} s"
                self._console.print(text, highlight=False)
        rate = self._rate or tokens / max(seconds, 1e-9)
        settled = sum(counts[name] for name in SETTLED)
        self._bar.update(self._task, completed=settled, tokens=(self._before + tokens) / 1e6, rate=rate)
