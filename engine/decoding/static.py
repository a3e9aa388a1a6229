"""Fixed number of positions a forward: MaskGIT's schedule, SDAR's `low_confidence_static` and `sequential`."""

from __future__ import annotations

import torch

from ..family import FamilyTraits
from .ranking import ranks, scheduled
from .spans import plan_block
from .view import Decision, RowView, Span, WindowStatistics


class Static:
    """Commit the scheduled number of candidates, best first; with `order` sequential, from the first one on."""

    name = "static"

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        return plan_block(view, traits)

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        count = scheduled(view.step, view.parameters["denoising_steps"], traits.block_size)
        best = ranks(statistics.confidence) < count[:, None]
        first = statistics.candidates.int().argmax(dim=1)
        offsets = torch.arange(best.shape[1], device=best.device)
        run = (offsets >= first[:, None]) & (offsets < first[:, None] + count[:, None])
        chosen = torch.where(view.parameters["order"][:, None], run, best)
        return Decision(chosen & statistics.candidates, statistics.token)
