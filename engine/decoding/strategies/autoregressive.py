"""Autoregressive decoding, the measure of all others."""

from __future__ import annotations

import msgspec
import torch

from ...family import FamilyTraits
from ..spans import plan_frontier
from ..strategy import FrontierStrategy, Values
from ..view import Decision, RowView, Span, WindowStatistics


class AutoregressiveParams(msgspec.Struct, frozen=True):
    """One token a forward, left to right."""


class Autoregressive(FrontierStrategy):
    """One row a forward: the last token's, which says what comes next."""

    name = "autoregressive"
    source = "any causal language model"
    Params = AutoregressiveParams

    def window(self, values: Values, traits: FamilyTraits) -> int:
        return 1

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        return plan_frontier(view, torch.ones_like(view.start))

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        return Decision(statistics.candidates, statistics.token)
