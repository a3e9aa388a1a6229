"""Confidence threshold: Fast-dLLM v2's `generate`, SDAR's `low_confidence_dynamic`."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta

from ...family import FamilyTraits
from ...plan import FLOOR, RULE
from ..ranking import ranks, scheduled, threshold_at
from ..strategy import GridParams, GridStrategy
from ..view import Decision, RowView, WindowStatistics


class ThresholdParams(GridParams, frozen=True):
    """Every position whose confidence exceeds a threshold, at least what the schedule asks for."""

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.9
    threshold_decay: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="the threshold falls to its value from 1, by this a forward")]
        | None
    ) = None
    denoising_steps: (
        Annotated[int, Meta(ge=1, le=256, description="schedule that sets the floor; default: one position a forward")]
        | None
    ) = None
    pace: (
        Annotated[
            int,
            Meta(ge=1, le=256, description="at most this many a forward, unused ones kept for later; default: all"),
        ]
        | None
    ) = None


class Threshold(GridStrategy):
    """Commit every candidate with confidence > threshold (strictly), if that is at least the scheduled number; else
    exactly the scheduled number of best ones. With the default schedule that is: at least the best one.
    """

    name = "threshold"
    source = "Fast-dLLM, arXiv 2505.22618; Fast-dLLM v2, arXiv 2509.26328; SDAR low_confidence_dynamic"
    Params = ThresholdParams

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        floor = scheduled(view.step, view.parameters["denoising_steps"], view.block)
        bar = threshold_at(view.step, view.parameters["threshold"], view.parameters["threshold_decay"])
        above = statistics.candidates & (statistics.confidence > bar[:, None])
        rank = ranks(statistics.confidence)
        pace = view.parameters["pace"]
        decided = (view.generated & view.decided).sum(dim=1)
        left = torch.where(pace > 0, (view.step + 1) * pace - decided, view.block)
        above &= rank < left[:, None]
        best = statistics.candidates & (rank < floor[:, None])
        enough = above.sum(dim=1) >= floor
        commit = torch.where(enough[:, None], above, best)
        return Decision(commit, statistics.token, reason=torch.where(enough, RULE, FLOOR))
