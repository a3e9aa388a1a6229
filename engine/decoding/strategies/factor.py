"""Fast-dLLM's factor rule: the more positions are decided together, the surer each must be."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta

from ...family import FamilyTraits
from ..ranking import ranks
from ..strategy import GridParams, GridStrategy
from ..view import Decision, RowView, WindowStatistics


class FactorParams(GridParams, frozen=True):
    """The most confident n positions, as long as the n-th one's confidence is at least 1 - factor / (n + 1)."""

    factor: Annotated[float, Meta(ge=0.0, le=256.0, description="greater decides more at a time")] = 1.0


class Factor(GridStrategy):
    """The longest run of candidates, best first, that all pass; the first one always does.

    From the bound under which deciding n positions at once equals deciding them one by one (Fast-dLLM, theorem 1). The
    authors' code also takes the candidate at which it stops if that is the second or the last one; `reference` does so.
    """

    name = "factor"
    source = "Fast-dLLM, arXiv 2505.22618"
    Params = FactorParams

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        asked = statistics.candidates & ~view.decided
        confidence = torch.where(asked, statistics.confidence, -torch.inf)
        rank = ranks(confidence)
        best_first = torch.sort(confidence, dim=1, descending=True, stable=True).values
        nth = torch.arange(1, view.width + 1, device=rank.device)
        passes = best_first >= 1 - view.parameters["factor"][:, None] / (nth + 1)
        passes[:, 0] = True
        count = passes.int().cumprod(dim=1).sum(dim=1)
        available = asked.sum(dim=1)
        count = torch.minimum(count, available)
        if self.reference:
            last = count == available - 1
            count = torch.where(last & (available > 1), available, count)
        return Decision(asked & (rank < count[:, None]), statistics.token)
