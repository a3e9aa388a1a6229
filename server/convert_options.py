"""Options of the stages of `linocut convert`, from what stands on the command line to their settings."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, TypeVar

import msgspec

from linocut.engine.errors import ConfigError

Settings = TypeVar("Settings")


def split_stages(texts: list[str] | None, stages: tuple[str, ...] | None) -> dict[str, dict[str, Any]]:
    """`STAGE.NAME=VALUE` by stage; with `stages` None, `NAME=VALUE` under the key "". Values are JSON, or plain text.

    Raises ConfigError.
    """
    found: dict[str, dict[str, Any]] = {stage: {} for stage in stages or ("",)}
    for text in texts or []:
        name, equals, value = text.partition("=")
        stage, name = name.split(".", 1) if stages and "." in name else ("", name)
        if not equals or not name or stage not in found:
            form = f"STAGE.NAME=VALUE, with a stage of {', '.join(stages)}" if stages else "NAME=VALUE"
            raise ConfigError(f"--set {text!r}: write {form}")
        found[stage][name] = _value(value)
    return found


def options_from(cls: type[Settings], fixed: dict[str, Any], options: dict[str, Any]) -> Settings:
    """A settings dataclass. `fixed` are its fields that have arguments of their own; `options` are checked by type.

    Raises ConfigError for a name that is no option and for a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in options:
        if name not in fields:
            known = ", ".join(sorted(set(fields) - set(fixed)))
            raise ConfigError(f"{name!r} is no option of this stage (it has: {known})")
        if name in fixed:
            raise ConfigError(f"{name!r} is not for --set: it is an argument of the command")
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in options.items():
        try:
            values[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name}: {error}") from None
    return cls(**fixed, **values)


def prompt_files(paths: list[str] | None) -> tuple[Any, ...]:
    """The files behind `PATH[=WEIGHT]`. Raises ConfigError."""
    from linocut.training.prompts import expand

    return tuple(expand(paths or []))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(text, text)
