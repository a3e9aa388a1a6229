"""Jacobi iteration towards the autoregressive text."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from ...family import FamilyTraits
from ..spans import plan_frontier
from ..strategy import FrontierStrategy, Values
from ..view import Decision, RowView, Span, WindowStatistics


class JacobiParams(msgspec.Struct, frozen=True):
    """Drafts of the forward before, accepted as far as the model's own choices confirm them."""

    draft_length: Annotated[int, Meta(ge=2, le=256, description="rows fed a forward, the last token included")] = 16


class Jacobi(FrontierStrategy):
    """Accept the drafts that the model's own choices confirm, and the choice behind them.

    The model's choice at a position is the greedy token, or the sample drawn with the noise of (seed, position), so the
    text is that of `autoregressive` token for token. Unlike the reference (engine `generate_chunk`), the choice behind
    the last accepted draft is committed at once instead of becoming the next draft's head; what the model said of the
    rejected positions becomes the next draft.
    """

    name = "jacobi"
    source = "Jacobi Forcing, arXiv 2512.14681"
    Params = JacobiParams

    def window(self, values: Values, traits: FamilyTraits) -> int:
        return int(values["draft_length"])

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        return plan_frontier(view, view.parameters["draft_length"])

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        choice, asked = statistics.token, statistics.candidates
        # The last row's choice has no draft to confirm; drafts stand at 0 .. length-2.
        length = asked.sum(dim=1, keepdim=True)
        agrees = (view.tokens == choice) & asked & (view.offsets < length - 1)
        accepted = agrees.int().cumprod(dim=1).sum(dim=1, keepdim=True)
        commits = accepted.clamp(min=1) if self.reference else accepted + 1
        # The next draft is what the model said beyond the committed positions, shifted to the new start. Behind it
        # stand tokens of the window itself: any id is a valid guess, and these cost nothing.
        offsets = view.offsets.long()
        source = torch.where(offsets + commits < length, offsets + commits, offsets % length.clamp(min=1))
        return Decision((offsets < commits) & asked, choice, drafts=choice.gather(1, source))
