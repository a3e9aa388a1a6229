"""Credit decoding: a token that keeps being the best guess crosses the threshold earlier."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta

from ...family import FamilyTraits
from ...plan import FLOOR, RULE
from ..memory import Memory
from ..ranking import ranks, threshold_at
from ..strategy import GridParams, GridStrategy, Values
from ..view import Decision, LogitBias, RowView, WindowStatistics

# Ids that a position keeps credit for. Those of the least credit go first.
SLOTS = 8
IDS, CREDIT = "credit_ids", "credit_values"


class CreditParams(GridParams, frozen=True):
    """Every position above a threshold, where ids that were the best guess before have their logits raised."""

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.9
    threshold_decay: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="the threshold falls to its value from 1, by this a forward")]
        | None
    ) = None
    credit_weight: Annotated[float, Meta(ge=0.0, le=10.0, description="of the raise, alpha")] = 0.7
    credit_power: Annotated[float, Meta(ge=0.0, le=10.0, description="of a guess's probability, gamma")] = 0.2
    credit_decay: Annotated[float, Meta(ge=0.0, le=1.0, description="of the credit, each forward, beta")] = 0.8


class Credit(GridStrategy):
    """Threshold decoding on logits + alpha * log(1 + C), where C = beta * C + p^gamma for a position's best guess.

    The authors keep C for the whole vocabulary; here a position keeps the SLOTS ids of most credit, which is the same
    as long as it has had no more than SLOTS different best guesses. Fresh for every block; rows that sample give credit
    to what they drew.
    """

    name = "credit"
    source = "dInfer, arXiv 2510.08666; CreditDecoding, arXiv 2510.06133"
    Params = CreditParams
    biased = True

    def memory(self, values: Values, traits: FamilyTraits) -> dict[str, Memory]:
        width = self.widest(traits)
        return super().memory(values, traits) | {
            IDS: Memory((width, SLOTS), torch.int64),
            CREDIT: Memory((width, SLOTS), torch.float32),
        }

    def bias(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> LogitBias:
        token = statistics.token
        # Ids and credit of another block say nothing: its first forward starts anew.
        fresh = (view.step == 0)[:, None, None]
        ids = view.recall(IDS)
        credit = torch.where(fresh, 0.0, view.recall(CREDIT) * view.parameters["credit_decay"][:, None, None])
        gain = statistics.confidence.clamp(min=0.0) ** view.parameters["credit_power"][:, None]
        gain = torch.where(statistics.candidates & ~view.decided, gain, 0.0)
        known = (ids == token[:, :, None]) & (credit > 0)
        place = torch.where(known.any(dim=2), known.int().argmax(dim=2), credit.argmin(dim=2))[:, :, None]
        kept = torch.where(known.any(dim=2, keepdim=True), credit.gather(2, place), 0.0)
        takes = (gain > 0)[:, :, None]
        ids = ids.scatter(2, place, torch.where(takes, token[:, :, None], ids.gather(2, place)))
        value = torch.where(takes, kept + gain[:, :, None], credit.gather(2, place))
        credit = credit.scatter(2, place, value)
        view.remember(IDS, ids)
        view.remember(CREDIT, credit)
        return LogitBias(ids, view.parameters["credit_weight"][:, None, None] * torch.log1p(credit))

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        bar = threshold_at(view.step, view.parameters["threshold"], view.parameters["threshold_decay"])
        above = statistics.confidence > bar[:, None]
        best = ranks(statistics.confidence) == 0
        enough = (statistics.candidates & above).any(dim=1)
        commit = statistics.candidates & (above | best)
        return Decision(commit, statistics.token, reason=torch.where(enough, RULE, FLOOR))
