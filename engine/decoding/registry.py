"""The strategies by name, and what a model offers of them."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import msgspec

from ..canvas.parameters import describe_samplers
from ..family import FamilyTraits
from . import strategies
from .columns import Columns
from .description import ParameterInfo, StrategyInfo, parameters_of
from .strategy import Equipment, Strategy


@cache
def strategy_classes() -> dict[str, type[Strategy]]:
    """Every subclass of Strategy that a module of `strategies/` defines, by name."""
    found: dict[str, type[Strategy]] = {}
    for module in pkgutil.iter_modules(strategies.__path__):
        for cls in _defined(importlib.import_module(f"{strategies.__name__}.{module.name}")):
            assert cls.name not in found, f"two strategies are named {cls.name}"
            found[cls.name] = cls
    return dict(sorted(found.items()))


def _defined(module: ModuleType) -> list[type[Strategy]]:
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Strategy)]
    return [cls for cls in classes if cls.__module__ == module.__name__ and hasattr(cls, "name")]


def build_strategies(reference: bool, equipment: Equipment | None = None) -> dict[str, Strategy]:
    """All strategies; with `reference` they keep their authors' rules of progress."""
    return {name: cls(reference, equipment) for name, cls in strategy_classes().items()}


@cache
def columns() -> Columns:
    """The columns of all parameters, as every strategy declares them."""
    return Columns([p for cls in strategy_classes().values() for p in parameters_of(cls.Params)])


@dataclass(frozen=True)
class Offered:
    """What a model offers, its default first."""

    strategy_table: tuple[StrategyInfo, ...]


def offered(traits: FamilyTraits) -> Offered:
    """Every strategy as it is on a family: with the family's bounds, or with the reason why it is not valid there."""
    first = default_strategy(traits)
    table = [_described(cls(), traits) for cls in strategy_classes().values()]
    table += describe_samplers(traits.context == "canvas", traits.reward)
    return Offered(tuple(sorted(table, key=lambda info: (info.name != first, bool(info.refusal), info.name))))


def default_strategy(traits: FamilyTraits) -> str:
    """What the family's own code does, or what its text is at best."""
    if traits.context == "canvas":
        return "guided" if traits.reward else "ancestral"
    if traits.mask_id is None:
        return "autoregressive"
    if traits.in_block == "causal":
        return "reorder"
    if traits.edit_ids is not None:
        return "levenshtein"
    return "verify" if traits.context == "token-causal" else "threshold"


def _described(strategy: Strategy, traits: FamilyTraits) -> StrategyInfo:
    refusal = "" if traits.context != "canvas" else "a model of a fixed canvas has samplers of its own"
    refusal = refusal or strategy.refusal(traits)
    parameters: list[ParameterInfo] = []
    changes = {} if refusal else strategy.bounds(traits)
    for parameter in parameters_of(strategy.Params):
        change = changes.get(parameter.name, {})
        if change is not None:
            parameters.append(msgspec.structs.replace(parameter, **change))
    return StrategyInfo(
        name=strategy.name,
        summary=(strategy.Params.__doc__ or "").strip(),
        source=strategy.source,
        parameters=tuple(parameters),
        refusal=refusal,
    )
