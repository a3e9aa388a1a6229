"""Fixed number of positions a forward: MaskGIT's schedule, SDAR's `low_confidence_static` and `sequential`."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from msgspec import Meta

from ...family import FamilyTraits
from ..ranking import ranks, scheduled
from ..strategy import GridParams, GridStrategy
from ..view import Decision, RowView, WindowStatistics


class StaticParams(GridParams, frozen=True):
    """A fixed number of positions a forward, the most confident ones or from left to right."""

    denoising_steps: (
        Annotated[int, Meta(ge=1, le=256, description="forwards a block takes; default: its length")] | None
    ) = None
    order: Annotated[Literal["confidence", "sequential"], Meta(description="best first, or left to right")] = (
        "confidence"
    )


class Static(GridStrategy):
    """Commit the scheduled number of candidates, best first; with `order` sequential, from the first one on."""

    name = "static"
    source = "MaskGIT schedule; SDAR low_confidence_static, sequential "
    Params = StaticParams

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        count = scheduled(view.step, view.parameters["denoising_steps"], view.block)
        best = ranks(statistics.confidence) < count[:, None]
        first = statistics.candidates.int().argmax(dim=1)
        run = (view.offsets >= first[:, None]) & (view.offsets < first[:, None] + count[:, None])
        chosen = torch.where(view.chosen("order", "sequential")[:, None], run, best)
        return Decision(chosen & statistics.candidates, statistics.token)
