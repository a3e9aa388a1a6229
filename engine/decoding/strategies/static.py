"""A fixed number of positions a forward: the schedules of MaskGIT, SDAR and Dream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ..ranking import ranks, scheduled
from ..strategy import GridParams, GridStrategy, Needs, Values
from ..view import Decision, RowView, WindowStatistics

# Where Dream's clock ends (its `eps`).
_END = 1e-3


class StaticParams(GridParams, frozen=True):
    """A fixed number of positions a forward, the most certain ones or from left to right."""

    denoising_steps: (
        Annotated[int, Meta(ge=1, le=256, description="forwards a block takes; default: its length")] | None
    ) = None
    order: Annotated[
        Literal["confidence", "margin", "entropy", "sequential"],
        Meta(description="best first by probability, by the lead over the second best, by entropy; or left to right"),
    ] = "confidence"
    schedule: Annotated[
        Literal["even", "timed"],
        Meta(description="the same number each forward, or Dream's share of the masks by a clock from 1 to 0"),
    ] = "even"


class Static(GridStrategy):
    """Commit the scheduled number of candidates, best first; with `order` sequential, from the first one on."""

    name = "static"
    source = "MaskGIT schedule; SDAR low_confidence_static and sequential; Dream maskgit_plus, topk_margin and entropy"
    Params = StaticParams

    def needs(self, values: Values) -> Needs:
        wanted = {"margin": Needs.MARGIN, "entropy": Needs.ENTROPY}.get(str(values.get("order")), Needs.NOTHING)
        return super().needs(values) | wanted

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        even = scheduled(view.step, view.parameters["denoising_steps"], view.block)
        timed = self._timed(view, traits)
        count = torch.where(view.chosen("schedule", "timed"), timed, even)
        score = statistics.confidence
        if statistics.margin is not None:
            # Of the probabilities: the second best is exp(-margin) times the best.
            lead = statistics.confidence * -torch.expm1(-statistics.margin)
            by_margin = view.chosen("order", "margin")[:, None]
            score = torch.where(by_margin & statistics.candidates, lead, score)
        if statistics.entropy is not None:
            by_entropy = view.chosen("order", "entropy")[:, None]
            score = torch.where(by_entropy & statistics.candidates, -statistics.entropy, score)
        best = ranks(score) < count[:, None]
        first = statistics.candidates.int().argmax(dim=1)
        run = (view.offsets >= first[:, None]) & (view.offsets < first[:, None] + count[:, None])
        chosen = torch.where(view.chosen("order", "sequential")[:, None], run, best)
        # A step of Dream's clock may decide nothing; elsewhere a forward in vain helps nobody.
        return Decision(chosen & statistics.candidates, statistics.token, idle=self.reference)

    def _timed(self, view: RowView, traits: FamilyTraits) -> Tensor:
        """[rows] int: masks * (1 - t[i+1] / t[i]), rounded down, of a clock that falls evenly; all in the last step."""
        steps = view.parameters["denoising_steps"]
        steps = torch.where(steps > 0, steps, view.block)
        step = view.step
        if traits.logit_source == "previous":
            # The forward that took the block's first token was the clock's first step.
            step = step + (~view.chosen("cache", "none")).int()
        tick = (1.0 - _END) / steps.double()
        share = 1.0 - (1.0 - tick * (step + 1)) / (1.0 - tick * step)
        masks = view.masked.sum(dim=1)
        count = torch.where(step + 1 >= steps, masks, (masks * share).int())
        return count if self.reference else count.clamp(min=1)

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        changes = super().bounds(traits)
        if traits.context != "full":
            changes["schedule"] = None
        return changes
