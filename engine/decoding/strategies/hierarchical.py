"""dInfer's hierarchical decoding: a sure token inside each gap splits the gap."""

from __future__ import annotations

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ..strategy import GridParams, GridStrategy
from ..view import Decision, RowView, WindowStatistics


class HierarchicalParams(GridParams, frozen=True):
    """Every position above a threshold, and the best one of each run of masks if it is above a lower one."""

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.9
    low_threshold: Annotated[
        float, Meta(ge=0.0, le=1.0, description="what the best position of a run of masks must exceed")
    ] = 0.6


class Hierarchical(GridStrategy):
    """The best candidate of each run of masks, all sure ones, and the best of all.

    Distant tokens say little about each other, and a decided one in the middle of a gap halves it, so that a block
    takes about the logarithm of its length in forwards at best. Runs are numbered per row, whatever the batch.
    """

    name = "hierarchical"
    source = "dInfer, arXiv 2510.08666"
    Params = HierarchicalParams

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        asked = statistics.candidates & ~view.decided
        confidence = torch.where(asked, statistics.confidence, -torch.inf)
        best = confidence == _best_of_run(asked, confidence)
        split = best & (confidence > view.parameters["low_threshold"][:, None])
        sure = confidence > view.parameters["threshold"][:, None]
        return Decision(asked & (split | sure), statistics.token)


def _best_of_run(asked: Tensor, confidence: Tensor) -> Tensor:
    """[rows, W]: the greatest confidence of the run of consecutive candidates that a position lies in."""
    before = torch.nn.functional.pad(asked, (1, 0))[:, :-1]
    run = (asked & ~before).int().cumsum(dim=1).long()
    best = torch.full((asked.shape[0], asked.shape[1] + 1), -torch.inf, device=asked.device)
    best = best.scatter_reduce(1, torch.where(asked, run, 0), confidence, "amax")
    return best.gather(1, run)
