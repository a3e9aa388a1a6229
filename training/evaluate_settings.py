"""The rows of the evaluation: which model, decoded in which way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from linocut.engine.errors import ConfigError

Value = bool | int | float | str


@dataclass(frozen=True)
class Setting:
    """One row. block_size None is the model's own; parameters are those of the strategy."""

    model: Literal["original", "converted"]
    strategy: str
    block_size: int | None = None
    parameters: dict[str, Value] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """As `parse` reads it; unique among rows."""
        block = {} if self.block_size is None else {"block_size": self.block_size}
        options = [f"{name}={value}" for name, value in {**block, **self.parameters}.items()]
        return ",".join([f"{self.model}/{self.strategy}", *options])

    @property
    def diffusion(self) -> dict[str, Any]:
        """The request's `diffusion` object."""
        return {"strategy": self.strategy, **self.parameters}


ORIGINAL = Setting("original", "autoregressive")
OWN = Setting("converted", "autoregressive")


def parse(text: str) -> Setting:
    """`[original/|converted/]strategy[,name=value...]`; block_size is the engine's. Raises ConfigError."""
    head, *options = text.strip().split(",")
    model, _, strategy = head.rpartition("/")
    if model not in ("", "original", "converted") or not strategy:
        raise ConfigError(f"setting {text!r} is not of the form [original/]strategy[,name=value...]")
    parameters: dict[str, Value] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"setting {text!r}: {option!r} is not name=value")
        parameters[name.strip()] = _value(value.strip())
    size = parameters.pop("block_size", None)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"setting {text!r}: block_size must be a positive integer")
    return Setting("original" if model == "original" else "converted", strategy, size, parameters)


def _value(text: str) -> Value:
    if text in ("true", "false", "True", "False"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def default_settings() -> list[Setting]:
    """The table of a model card. `row_cost` 0 runs every row that could be of use, whatever the load: the algorithm's
    own tokens per forward; without it the engine weighs rows by device and load, as when it serves."""
    settings = [ORIGINAL, OWN, Setting("converted", "verify")]
    settings += [Setting("converted", "verify", None, {"draft_length": n, "row_cost": 0}) for n in (2, 3, 4, 6, 8)]
    for size in (4, 8, 16):
        settings.append(Setting("converted", "static", size))
        for threshold in (0.4, 0.55, 0.7, 0.9):
            settings.append(Setting("converted", "threshold", size, {"threshold": threshold}))
    return settings


def complete(settings: Sequence[Setting | str] | None) -> list[Setting]:
    """Parsed, without repetitions, with the two autoregressive rows first that the others are compared with."""
    chosen = default_settings() if settings is None else [parse(s) if isinstance(s, str) else s for s in settings]
    return list({setting.label: setting for setting in [ORIGINAL, OWN, *chosen]}.values())
