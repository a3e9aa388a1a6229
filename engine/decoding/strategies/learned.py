"""Learn2PD: a small network decides from a block's confidences which proposals are right."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ...plan import FLOOR, RULE
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
    end_of_text: Annotated[
        bool, Meta(description="decide nothing behind the block's first stop id, decided or taken for right")
    ] = False


class Learned(GridStrategy):
    """Commit what the filter takes for right, and the scheduled number of most confident ones.

    The filter sees the confidences of all positions of the block; of a decided one that of the model's best guess there
    now, 0 of a prompt's and of one that is final.

    With `end_of_text` positions behind a stop id count as decided: the row ends as soon as those before it are, and no
    forward is spent on the rest. The authors cut the canvas there (EoTP), and even where a mask of a later block merely
    proposes a stop id, however unsure; that we leave out.
    """

    name = "learned"
    source = "Learn2PD, arXiv 2509.25188"
    Params = LearnedParams
    sums = True
    asks_all = True

    def refusal(self, traits: FamilyTraits) -> str:
        return super().refusal(traits) or ("" if traits.has_filter else "the model folder holds no filter")

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        # The filter looks at all of the block.
        return super().bounds(traits) | {"sub_block_size": None, "sub_block_cache": None}

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        assert self.equipment.filter is not None
        masks = statistics.candidates & view.masked
        probability = self.equipment.filter(filter_input(statistics)).sigmoid()
        right = masks & (probability > view.parameters["filter_threshold"][:, None])
        masks = masks & ~_behind_stop(view, statistics, right)
        floor = scheduled(view.step, view.parameters["denoising_steps"], view.block)
        best = ranks(torch.where(masks, statistics.confidence, -torch.inf)) < floor[:, None]
        reason = torch.where((masks & right).any(dim=1), RULE, FLOOR)
        return Decision(masks & (right | best), statistics.token, reason=reason)


def filter_input(statistics: WindowStatistics) -> Tensor:
    """[rows, W] float32, at most 1: what a clean row says of the position behind it is certain."""
    return torch.where(statistics.candidates, statistics.confidence, 0.0).clamp(max=1.0)


def _behind_stop(view: RowView, statistics: WindowStatistics, right: Tensor) -> Tensor:
    """[rows, W] bool: behind the first stop id that is decided or `right`, of rows that asked for `end_of_text`."""
    if view.stops is None:
        return torch.zeros_like(right)
    known = view.decided & view.generated
    token = torch.where(known, view.tokens.long(), statistics.token)
    stops = (token[:, :, None] == view.stops[:, None, :]).any(dim=2) & (known | right)
    behind = stops.int().cumsum(dim=1) - stops.int() > 0
    return behind & view.parameters["end_of_text"][:, None]
