"""Log lines: plain text, or a JSON object each."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

from linocut.engine.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")


@dataclass(frozen=True)
class LogSettings:
    """Of the server and of its engine. Raises ConfigError."""

    level: str = "info"
    format: str = "text"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(f"--log-level {self.level!r}: {', '.join(LEVELS)}")
        if self.format not in FORMATS:
            raise ConfigError(f"--log-format {self.format!r}: {', '.join(FORMATS)}")

    def apply(self) -> None:
        """Set up this process's logging."""
        handler = logging.StreamHandler(sys.stderr)
        plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        handler.setFormatter(JsonFormatter() if self.format == "json" else plain)
        logging.basicConfig(level=self.level.upper(), handlers=[handler])
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, message; an event's `fields` beside them instead of in the message."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, object] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        event = getattr(record, "event", None)
        if event is None:
            line["message"] = record.getMessage()
        else:
            line |= {"message": event, **getattr(record, "fields", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # ASCII only: a lone surrogate in somebody's text must not lose the line.
        return json.dumps(line, default=str)


def log_event(log: logging.Logger, level: int, event: str, text: str, fields: dict[str, object]) -> None:
    """One record that reads `text` in plain logs and has `fields` in JSON ones."""
    log.log(level, "%s", text, extra={"event": event, "fields": fields})
