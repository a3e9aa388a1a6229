"""Confidence threshold: Fast-dLLM v2's `generate`, SDAR's `low_confidence_dynamic`."""

from __future__ import annotations

import torch

from ..family import FamilyTraits
from .ranking import ranks, scheduled
from .spans import plan_block
from .view import Decision, RowView, Span, WindowStatistics


class Threshold:
    """Commit every candidate with confidence > threshold (strictly), if that is at least the scheduled number; else
    exactly the scheduled number of best ones. With the default schedule that is: at least the best one.
    """

    name = "threshold"

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        return plan_block(view, traits)

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        floor = scheduled(view.step, view.parameters["denoising_steps"], traits.block_size)
        above = statistics.candidates & (statistics.confidence > view.parameters["threshold"][:, None])
        best = statistics.candidates & (ranks(statistics.confidence) < floor[:, None])
        enough = above.sum(dim=1) >= floor
        return Decision(torch.where(enough[:, None], above, best), statistics.token)
