"""Learn2PD: a small network decides from a block's confidences which proposals are right."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta

from ...family import FamilyTraits
from ..ranking import ranks, scheduled
from ..strategy import GridParams, GridStrategy
from ..view import Decision, RowView, WindowStatistics


class LearnedParams(GridParams, frozen=True):
    """The positions whose proposals a trained filter takes for right, at least what the schedule asks for."""

    filter_threshold: Annotated[
        float, Meta(ge=0.0, le=1.0, description="commit if the filter's probability > this")
    ] = 0.96
    denoising_steps: (
        Annotated[int, Meta(ge=1, le=256, description="schedule that sets the floor; default: one position a forward")]
        | None
    ) = None


class Learned(GridStrategy):
    """Commit what the filter takes for right, and the scheduled number of most confident ones.

    The filter sees the confidences of all positions of the block; of a decided one that of the model's best guess there
    now, of a prompt's 0.
    """

    name = "learned"
    source = "Learn2PD, arXiv 2509.25188"
    Params = LearnedParams
    asks_all = True

    def refusal(self, traits: FamilyTraits) -> str:
        return super().refusal(traits) or ("" if traits.has_filter else "the model folder holds no filter")

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        assert self.equipment.filter is not None
        masks = statistics.candidates & view.masked
        confidence = torch.where(statistics.candidates, statistics.confidence, 0.0)
        right = self.equipment.filter(confidence).sigmoid() > view.parameters["filter_threshold"][:, None]
        floor = scheduled(view.step, view.parameters["denoising_steps"], view.block)
        best = ranks(torch.where(masks, statistics.confidence, -torch.inf)) < floor[:, None]
        return Decision(masks & (right | best), statistics.token)
