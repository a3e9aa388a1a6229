"""Token-causal decoding: autoregressive, and Jacobi iteration towards the same text."""

from __future__ import annotations

import torch

from ..family import FamilyTraits
from .spans import plan_frontier
from .view import Decision, RowView, Span, WindowStatistics


class Autoregressive:
    """One token a forward: Jacobi decoding without drafts."""

    name = "autoregressive"

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        return plan_frontier(view, traits)

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        return Decision(statistics.candidates, statistics.token)


class Jacobi:
    """Accept the drafts that the model's own choices confirm, and the choice behind them.

    Jacobi Forcing (arXiv 2512.14681, engine `generate_chunk`). The model's choice at a position is the greedy token, or
    the sample drawn with the noise of (seed, position), so the text is that of `autoregressive` token for token. Unlike
    the reference, the choice behind the last accepted draft is committed at once instead of becoming the next draft's
    head (`bonus`); what the model said of the rejected positions becomes the next draft.
    """

    name = "jacobi"

    def __init__(self, bonus: bool = True) -> None:
        self.bonus = bonus

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        return plan_frontier(view, traits)

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        choice, asked = statistics.token, statistics.candidates
        window = choice.shape[1]
        offsets = torch.arange(window, device=choice.device)
        # The last row's choice has no draft to confirm; drafts stand at 0 .. length-2.
        length = asked.sum(dim=1, keepdim=True)
        agrees = (view.tokens == choice) & asked & (offsets < length - 1)
        accepted = agrees.int().cumprod(dim=1).sum(dim=1, keepdim=True)
        commits = accepted + 1 if self.bonus else accepted.clamp(min=1)
        # The next draft is what the model said beyond the committed positions, shifted to the new start. Behind it
        # stand tokens of the window itself: any id is a valid guess, and these cost nothing.
        source = torch.where(offsets + commits < length, offsets + commits, offsets % length.clamp(min=1))
        return Decision((offsets < commits) & asked, choice, drafts=choice.gather(1, source))
