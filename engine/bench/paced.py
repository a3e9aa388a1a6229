"""Commit rules of benchmarks alone: they decide as many positions a forward as they are told to.

Random weights are certain of nothing, and no draft of theirs is right, so that real rules say nothing of the speed at
which a trained model would decode.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core import EngineCore
from ..decoding.strategies.static import Static
from ..decoding.strategies.verify import Verify
from ..decoding.strategy import Values
from ..decoding.view import Decision, RowView, Span, WindowStatistics
from ..family import FamilyTraits


class PacedGrid(Static):
    """Blocks are decided from left to right in `denoising_steps` forwards, whatever the model says.

    After each of them as much is decided as the schedule wants, or as the sub-block has left; the forward that decides
    a block's first position for a shifted family is not counted.
    """

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        given = 1 if traits.commit_seeds else 0
        steps = view.parameters["denoising_steps"]
        steps = torch.where(steps > 0, steps, view.block)
        # Rounded up.
        wanted = given - (view.step + 1) * (given - view.block) // steps
        wanted = torch.minimum(wanted, view.block)
        count = (wanted - (view.decided & view.inside).sum(dim=1)).clamp(min=1)
        candidates = statistics.candidates
        return Decision(candidates & (candidates.cumsum(dim=1) <= count[:, None]), statistics.token)


class PacedVerify(Verify):
    """Of a row's drafts a given number are right in each forward, or all where there are fewer.

    Of a number that is not whole, one more in so many forwards. What a row promises, and which rows run at the present
    load, is decided as it is for drafts that are right with a given probability. right, probability: [] float32, on
    the device.
    """

    right: Tensor
    probability: Tensor

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        known = self.probability.to(view.draft_confidence.dtype).expand_as(view.draft_confidence)
        return super().plan(replace(view, draft_confidence=known), traits)

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        choice, asked = statistics.token, statistics.candidates
        drafts = (asked.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        accepted = torch.minimum((self.right + _luck(view)).int(), drafts)
        return Decision((view.offsets <= accepted) & asked, choice, accepted=accepted[:, 0])


def _luck(view: RowView) -> Tensor:
    """[rows, 1] float32 in [0, 1): of a row and where it stands, always the same."""
    mask = 0xFFFFFFFF
    mixed = (view.places[:, :1].long() * 0x9E3779B1 + view.slots[:, None] * 0x85EBCA6B) & mask
    for factor in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & mask
    return ((mixed ^ (mixed >> 16)) & 0xFFFFFF).float() / (1 << 24)


class Pace:
    """Replaces the rules of `static` and of `verify` in an engine, for as long as it lives."""

    def __init__(self, core: EngineCore) -> None:
        if core.runner.graphs is not None and core.runner.graphs.captures:
            raise ValueError("graphs of the real rules were captured already")
        strategies, equipment = core.runner.strategies, core.runner.strategies["verify"].equipment
        strategies["static"] = PacedGrid(False, equipment)
        strategies["verify"] = verify = PacedVerify(False, equipment)
        # Tensors, so that graphs need not be captured again.
        self._right, self._probability = torch.zeros(2, device=core.runner.state.device).unbind()
        verify.right, verify.probability = self._right, self._probability

    def accept(self, right: float, probability: float) -> None:
        """From now on so many drafts of a row of `verify` are right in a forward, each with this probability for all
        that the engine knows."""
        self._right.fill_(right)
        self._probability.fill_(probability)


def refinements(tokens: float, block: int, traits: FamilyTraits) -> int:
    """`denoising_steps` with which a block of `block` yields about `tokens` a forward, all its forwards counted."""
    others = 1 if traits.commit_seeds else 0
    return min(max(round(block / tokens) - others, 1), block)


def acceptance(tokens: float, drafts: int) -> float:
    """The probability of a right draft with which `drafts` of them yield `tokens` a forward, on average."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if 1 + sum(middle**n for n in range(1, drafts + 1)) < tokens:
            low = middle
        else:
            high = middle
    return high if tokens > 1 else 0.0


def cycle_of(values: Values, traits: FamilyTraits) -> int:
    """Forwards after which rows that began together are where they were, a block further; 1: there is no such cycle."""
    steps = values.get("denoising_steps")
    return 1 if steps is None else int(steps) + (1 if traits.commit_seeds else 0)
