"""The strategies by name."""

from __future__ import annotations

from .frontier import Autoregressive, Jacobi
from .static import Static
from .strategy import Strategy
from .threshold import Threshold
from .verify import Verify


def strategies(reference: bool) -> dict[str, Strategy]:
    """All strategies; with `reference` they keep their authors' rules of progress."""
    every: tuple[Strategy, ...] = (Threshold(), Static(), Autoregressive(), Jacobi(bonus=not reference), Verify())
    return {strategy.name: strategy for strategy in every}
