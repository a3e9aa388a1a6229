"""The rows of the evaluation: which model, decoded in which way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from linocut.engine.decoding.filter import FILE as FILTER_FILE
from linocut.engine.decoding.registry import offered
from linocut.engine.errors import ConfigError
from linocut.engine.family import family_from_config
from linocut.engine.loading import read_config

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


# What trades speed for quality in a strategy, and the values that a comparison tries.
KNOBS: dict[str, tuple[str, tuple[Value, ...]]] = {
    "threshold": ("threshold", (0.5, 0.7, 0.9)),
    "factor": ("factor", (0.5, 1.0)),
    "entropy": ("entropy", (0.3, 1.0)),
    "entropy_bound": ("gamma", (0.1, 0.5)),
    "hierarchical": ("threshold", (0.7, 0.9)),
    "credit": ("threshold", (0.7, 0.9)),
    "learned": ("filter_threshold", (0.6, 0.8)),
    "jacobi": ("candidates", (0, 16)),
}

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


def strategy_settings(folder: Path) -> list[Setting]:
    """Every strategy that is valid on a model folder, with its defaults and, of those with one, over its main knob."""
    raw, generation = read_config(folder)
    traits = family_from_config(raw, generation)
    traits = replace(traits, has_filter=(folder / FILTER_FILE).exists())
    found = []
    for info in offered(traits).strategy_table:
        if info.refusal or info.name == "autoregressive":
            continue
        knob, values = KNOBS.get(info.name, ("", ()))
        found += [Setting("converted", info.name, None, {knob: value}) for value in values] or [
            Setting("converted", info.name)
        ]
    halting: dict[str, Value] = {"threshold": 0.9, "halt": "linear", "halt_high": 4.0, "halt_low": 1.0}
    return [*found, Setting("converted", "threshold", None, halting)]
