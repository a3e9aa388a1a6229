"""From a request's `diffusion` object to complete parameters. Imports no torch."""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import ParameterError
from ..params import DecodingParams, ParameterValue
from .description import StrategyInfo


class Offer(Protocol):
    """What a model offers, its default first: `ModelInfo` and `registry.Offered` have it."""

    @property
    def strategy_table(self) -> tuple[StrategyInfo, ...]: ...


def valid_names(offer: Offer) -> tuple[str, ...]:
    """Names of the strategies that are valid on a model, the default first."""
    return tuple(strategy.name for strategy in offer.strategy_table if not strategy.refusal)


def resolve(
    offer: Offer,
    requested: dict[str, Any] | None,
    default_strategy: str | None = None,
    default_values: dict[str, ParameterValue] | None = None,
) -> DecodingParams:
    """Turn a request's `diffusion` object into complete parameters.

    `requested` is {"strategy": name, **parameters} or None; the operator's defaults fill what it leaves out, where they
    belong to the strategy in use. A parameter whose default is None is left out of the result. Raises ParameterError
    naming `diffusion.<field>`.
    """
    asked = dict(requested or {})
    known = {strategy.name: strategy for strategy in offer.strategy_table}
    default = default_strategy or valid_names(offer)[0]
    name = asked.pop("strategy", None)
    name = default if name is None else name
    if not isinstance(name, str) or name not in known:
        names = ", ".join(sorted(known))
        raise ParameterError("diffusion.strategy", f"unknown strategy {str(name)[:64]!r} (known: {names})")
    strategy = known[name]
    if strategy.refusal:
        valid = ", ".join(valid_names(offer))
        why = f"strategy {name!r} is not valid on this model: {strategy.refusal} (valid: {valid})"
        raise ParameterError("diffusion.strategy", why)
    parameters = {parameter.name: parameter for parameter in strategy.parameters}
    base = {k: v for k, v in (default_values or {}).items() if name == default and k in parameters}
    values: dict[str, ParameterValue] = {k: p.default for k, p in parameters.items() if p.default is not None}
    for key, value in {**base, **{k: v for k, v in asked.items() if v is not None}}.items():
        if key not in parameters:
            allowed = ", ".join(parameters) or "none"
            raise ParameterError(f"diffusion.{key}"[:80], f"unknown parameter of strategy {name!r} (it has: {allowed})")
        fault = parameters[key].fault(value)
        if fault:
            raise ParameterError(f"diffusion.{key}", fault)
        values[key] = float(value) if parameters[key].kind == "number" else value
    return DecodingParams(strategy=name, values=values)
