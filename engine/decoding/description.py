"""What the server knows of a strategy: its parameters as data. Imports no torch.

The engine describes its strategies to the server (`ModelInfo.strategy_table`), which validates a request's `diffusion`
object against that, before anything is scheduled.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
from msgspec import inspect

from ..params import ParameterValue

Kind = Literal["integer", "number", "boolean", "choice"]


class ParameterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter. default None: the strategy chooses. minimum, maximum: inclusive bounds of numbers."""

    name: str
    kind: Kind
    description: str
    default: ParameterValue | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[ParameterValue, ...] = ()

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, None if nothing is."""
        if self.kind == "boolean":
            return None if isinstance(value, bool) else f"must be true or false, not {_show(value)}"
        if self.choices:
            same = [choice for choice in self.choices if type(choice) is type(value) and choice == value]
            return None if same else f"must be one of {', '.join(map(str, self.choices))}, not {_show(value)}"
        number = "an integer" if self.kind == "integer" else "a number"
        allowed = (int,) if self.kind == "integer" else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            return f"must be {number}, not {_show(value)}"
        if self.minimum is not None and not value >= self.minimum:
            return f"must be {number} of at least {self.minimum:g}"
        if self.maximum is not None and not value <= self.maximum:
            return f"must be {number} of at most {self.maximum:g}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be {number}, not {_show(value)}"
        return None


class StrategyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A strategy on one model. refusal: why it is not valid there, "" if it is."""

    name: str
    summary: str
    source: str
    parameters: tuple[ParameterInfo, ...] = ()
    refusal: str = ""


def parameters_of(struct: type[msgspec.Struct]) -> tuple[ParameterInfo, ...]:
    """The parameters that a strategy's `Params` declares: bool, int, float or Literal of texts, each maybe `| None`."""
    described = inspect.type_info(struct)
    assert isinstance(described, inspect.StructType)
    return tuple(_parameter(field) for field in described.fields)


def _parameter(field: inspect.Field) -> ParameterInfo:
    words = ""
    type_ = field.type
    if isinstance(type_, inspect.Metadata):
        words = str((type_.extra_json_schema or {}).get("description", ""))
        type_ = type_.type
    options = type_.types if isinstance(type_, inspect.UnionType) else (type_,)
    options = tuple(option for option in options if not isinstance(option, inspect.NoneType))
    assert len(options) == 1, f"{field.name}: a parameter has one type"
    inner = options[0]
    if isinstance(inner, inspect.Metadata):
        words = str((inner.extra_json_schema or {}).get("description", words))
        inner = inner.type
    default = None if field.default is msgspec.NODEFAULT else field.default
    found: dict[str, Any] = {"name": field.encode_name, "description": words, "default": default}
    if isinstance(inner, inspect.BoolType):
        return ParameterInfo(kind="boolean", **found)
    if isinstance(inner, inspect.LiteralType):
        return ParameterInfo(kind="choice", choices=tuple(v for v in inner.values if v is not None), **found)
    assert isinstance(inner, inspect.IntType | inspect.FloatType), f"{field.name}: not a kind of parameter"
    kind: Kind = "integer" if isinstance(inner, inspect.IntType) else "number"
    assert (inner.gt, inner.lt) == (None, None), f"{field.name}: bounds are inclusive"
    return ParameterInfo(kind=kind, minimum=inner.ge, maximum=inner.le, **found)


def _show(value: Any) -> str:
    return repr(value)[:40]
