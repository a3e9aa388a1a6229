"""EB-sampler: as many positions at a time as their joint entropy allows."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta

from ...family import FamilyTraits
from ..ranking import ranks
from ..strategy import GridParams, GridStrategy, Needs, Values
from ..view import Decision, RowView, WindowStatistics


class EntropyBoundParams(GridParams, frozen=True):
    """The positions of lowest entropy, as long as the sum of their entropies without the greatest stays in a bound."""

    gamma: Annotated[float, Meta(ge=0.0, le=1000.0, description="the bound, in nats")] = 0.1


class EntropyBound(GridStrategy):
    """Candidates by rising entropy while sum(H) - max(H) <= gamma, which bounds what they tell about each other.

    The first one always passes, since its sum is its maximum.
    """

    name = "entropy_bound"
    source = "EB-Sampler, arXiv 2505.24857"
    Params = EntropyBoundParams
    sums = True

    def needs(self, values: Values) -> Needs:
        return super().needs(values) | Needs.ENTROPY

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        assert statistics.entropy is not None
        asked = statistics.candidates & ~view.decided
        entropy = torch.where(asked, statistics.entropy, torch.inf)
        rising = torch.sort(entropy, dim=1, stable=True).values
        # In rising order the last one is the greatest: the sum of those before it is what counts.
        before = torch.where(rising.isfinite(), rising, 0.0).cumsum(dim=1) - torch.where(rising.isfinite(), rising, 0.0)
        count = (before <= view.parameters["gamma"][:, None]).int().cumprod(dim=1).sum(dim=1)
        return Decision(asked & (ranks(-entropy) < count[:, None]), statistics.token)
