"""dParallel's rule: commit what the model is certain of by its entropy."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ...family import FamilyTraits
from ..strategy import GridParams, GridStrategy, Needs, Values
from ..view import Decision, RowView, WindowStatistics


class EntropyParams(GridParams, frozen=True):
    """Every position whose entropy is below a threshold."""

    entropy: Annotated[float, Meta(ge=0.0, le=100.0, description="commit if entropy < this, in nats")] = 0.5


class Entropy(GridStrategy):
    """Commit every candidate of low entropy; the guard adds the most confident one where there is none."""

    name = "entropy"
    source = "dParallel, arXiv 2509.26488"
    Params = EntropyParams

    def needs(self, values: Values) -> Needs:
        return super().needs(values) | Needs.ENTROPY

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        assert statistics.entropy is not None
        certain = statistics.entropy < view.parameters["entropy"][:, None]
        return Decision(statistics.candidates & certain, statistics.token)
