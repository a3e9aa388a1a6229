"""dInfer's hierarchical decoding: a sure token inside each gap splits the gap."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ..ranking import ranks, threshold_at
from ..spans import plan_grid, predicted_by_kept, refined
from ..strategy import GridParams, GridStrategy
from ..view import Decision, RowView, Span, WindowStatistics


class HierarchicalParams(GridParams, frozen=True):
    """Every position above a threshold, and the best one of each run of masks if it is above a lower one."""

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.9
    threshold_decay: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="the threshold falls to its value from 1, by this a forward")]
        | None
    ) = None
    low_threshold: Annotated[
        float, Meta(ge=0.0, le=1.0, description="what the best position of a run of masks must exceed")
    ] = 0.6
    remask_threshold: (
        Annotated[
            float,
            Meta(ge=0.0, le=1.0, description="decided tokens of the block are masks again below this; default: never"),
        ]
        | None
    ) = None


class Hierarchical(GridStrategy):
    """The best candidate of each run of masks, all sure ones, and the best of all.

    Distant tokens say little about each other, and a decided one in the middle of a gap halves it, so that a block
    takes about the logarithm of its length in forwards at best. Runs are numbered per row, whatever the batch.

    With `remask_threshold` a decided position is doubted where the model's best guess has become less probable than
    that, be it another id or the same. Doubted positions take part like masks; those that are not decided anew become
    masks again. At least one position more than are doubted is decided, the best ones if need be, so that every forward
    leaves fewer masks. Nothing of a block is out before all of it is decided. The prompt is never doubted (the authors'
    code does so).
    """

    name = "hierarchical"
    source = "dInfer, arXiv 2510.08666"
    Params = HierarchicalParams
    asks_all = True

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        # A decided token is final there as soon as all before it are.
        final = {"remask_threshold": None} if traits.final_by_token else {}
        return super().bounds(traits) | final

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        span = plan_grid(view, traits)
        asks = _remasks(view) & ~span.seeding
        doubtful = refined(view, traits) & view.generated & ~predicted_by_kept(view, traits)
        span.targets = span.targets | (asks[:, None] & doubtful)
        return span

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        masks = statistics.candidates & ~view.decided
        remasks = _remasks(view)
        floor = view.parameters["remask_threshold"][:, None]
        doubted = statistics.candidates & view.decided & (statistics.confidence < floor)
        asked = masks | doubted
        confidence = torch.where(asked, statistics.confidence, -torch.inf)
        best = confidence == _best_of_run(asked, confidence)
        split = best & (confidence > view.parameters["low_threshold"][:, None])
        bar = threshold_at(view.step, view.parameters["threshold"], view.parameters["threshold_decay"])
        sure = confidence > bar[:, None]
        commit = asked & (split | sure | (ranks(confidence) == 0))
        missing = torch.where(remasks, doubted.sum(dim=1) + 1 - commit.sum(dim=1), 0)
        rest = asked & ~commit
        commit = commit | (rest & (ranks(torch.where(rest, confidence, -torch.inf)) < missing[:, None]))
        return Decision(
            commit, statistics.token, overwrite=commit & doubted, remask=doubted & ~commit, revisable=remasks
        )


def _remasks(view: RowView) -> Tensor:
    """[rows] bool: whether the row doubts what is decided."""
    return view.parameters["remask_threshold"] >= 0


def _best_of_run(asked: Tensor, confidence: Tensor) -> Tensor:
    """[rows, W]: the greatest confidence of the run of consecutive candidates that a position lies in."""
    before = torch.nn.functional.pad(asked, (1, 0))[:, :-1]
    run = (asked & ~before).int().cumsum(dim=1).long()
    best = torch.full((asked.shape[0], asked.shape[1] + 1), -torch.inf, device=asked.device)
    best = best.scatter_reduce(1, torch.where(asked, run, 0), confidence, "amax")
    return best.gather(1, run)
