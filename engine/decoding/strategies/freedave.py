"""FreeDave: states that static decoding would reach next are drafted and verified side by side."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ..memory import Memory
from ..ranking import ranks
from ..strategy import GridParams, GridStrategy, RowCost, Values
from ..view import Decision, RowView, Span, WindowStatistics

# Rows that the branches of a sequence may take together.
MAX_BRANCH_ROWS = 256
DRAFT, SURE = "freedave_draft", "freedave_confidence"
UNDECIDED = -1


class FreeDaveParams(GridParams, frozen=True):
    """The text of `static` with one position a forward, in fewer forwards: next states are drafted and verified."""

    branches: Annotated[int, Meta(ge=1, le=16, description="states run a forward, the present one included")] = 4
    threshold: (
        Annotated[
            float, Meta(ge=0.0, le=1.0, description="a step decides all above this (FreeDave++); default: the best")
        ]
        | None
    ) = None
    order: Annotated[
        Literal["confidence", "margin", "entropy", "sequential"],
        Meta(description="best first, or left to right"),
    ] = "confidence"
    row_cost: RowCost = None


class FreeDave(GridStrategy):
    """Draft the next states of one-by-one decoding from one set of logits, run them, keep the furthest that is right.

    The block's own slots hold the present state. A branch is a draft segment behind it: the block with the next one,
    two, ... masks filled from the logits of the step before, seeing the prefix and itself. A step on the present state
    that gives exactly the first branch makes that branch the present state, and so on; the last state's step is what is
    committed, and its logits draft the next branches. So the text, also a sampled one, is that of single steps whatever
    was drafted, and the number of branches may follow the load: one is run while the probability that it is reached
    pays for its rows. After arXiv 2510.00294, whose first branch is our present state.

    With a threshold a step may decide several positions and so pass over branches. Rows that sample do not follow it
    there: each branch drew with the noise of as many steps as it has drafted positions.
    """

    name = "freedave"
    source = "FreeDave, arXiv 2510.00294"
    Params = FreeDaveParams
    chains = True
    branches = True

    def refusal(self, traits: FamilyTraits) -> str:
        if traits.final_by_token and traits.mask_id is not None:
            return "decided tokens of this model are final as soon as all before them are: `verify` drafts for it"
        if traits.context == "full":
            return "a branch would have to hold the whole canvas"
        return super().refusal(traits)

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        most = max(min(16, MAX_BRANCH_ROWS // traits.block_size + 1), 1)
        return super().bounds(traits) | {
            "branches": {"maximum": most, "default": min(4, most)},
            "order": {"choices": ("confidence", "sequential")},
            # A stale neighbour would be another one in a branch, and a halt looks at single steps.
            "sub_block_cache": None,
            **{name: None for name in GridParams.__struct_fields__ if name.startswith("halt")},
        }

    def memory(self, values: Values, traits: FamilyTraits) -> dict[str, Memory]:
        width = self.widest(traits)
        return {DRAFT: Memory((width,), torch.int64), SURE: Memory((width,), torch.float32)}

    def segment(self, values: Values, traits: FamilyTraits) -> int:
        return traits.block_size if int(values["branches"]) > 1 else 0

    def segments(self, values: Values) -> int:
        return int(values["branches"]) - 1

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        span = super().plan(view, traits)
        masks = span.targets & view.masked & ~span.seeding[:, None]
        draft, sure = self._drafted(view, masks)
        most = min(MAX_BRANCH_ROWS // traits.block_size, 15)
        # Branch 0 is the present state, and one that fills all masks needs no forward of its own.
        filled = branches(masks, self._order(view, sure), most + 1)[:, 1:]
        left = (masks[:, None] & ~filled).any(dim=2)
        reach = torch.where(filled, sure[:, None, :], 1.0).prod(dim=2)
        worth = reach >= view.row_cost[:, None] * traits.block_size
        index = torch.arange(1, most + 1, device=reach.device)
        wanted = left & worth & (index < view.parameters["branches"][:, None]) & (view.step > 0)[:, None]
        # Nested, so that the first one that is not run ends them.
        span.segments = torch.where(wanted.int().cumprod(dim=1) > 0, 0, -1).int()
        span.segment_tokens = torch.where(filled, draft[:, None, :].int(), view.tokens[:, None, :])
        return span

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        masks = statistics.candidates & view.masked
        draft, sure = self._drafted(view, masks)
        token, confidence = statistics.token[:, None], statistics.confidence[:, None]
        ran = torch.ones_like(view.fresh)[:, None]
        if statistics.segments is not None:
            found = statistics.segments
            token = torch.cat([token, found.token], dim=1)
            confidence = torch.cat([confidence, found.confidence], dim=1)
            ran = torch.cat([ran, found.candidates.any(dim=2)], dim=1)
        # [rows, K, W]: what each state has decided, and what a single step on it decides.
        filled = branches(masks, self._order(view, sure), token.shape[1])
        left = masks[:, None] & ~filled
        confidence = torch.where(left, confidence, -torch.inf)
        taken = torch.stack(
            [
                single_step(left[:, k], self._order(view, confidence[:, k]), confidence[:, k], self._threshold(view))
                for k in range(token.shape[1])
            ],
            dim=1,
        )
        states = torch.where(filled, draft[:, None], UNDECIDED)
        targets = torch.where(taken, token, states)
        best, steps = furthest(states, targets, ran, only_next=view.sampled)
        at = best[:, None, None].expand(-1, 1, view.width)
        view.remember(DRAFT, token.gather(1, at)[:, 0])
        view.remember(SURE, confidence.gather(1, at)[:, 0])
        target = targets.gather(1, at)[:, 0]
        commit = target != UNDECIDED
        return Decision(commit, torch.where(commit, target, statistics.token), steps=steps.int())

    def _drafted(self, view: RowView, masks: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, W] each: the drafted ids, and how sure the model was of them."""
        return view.recall(DRAFT), torch.where(masks, view.recall(SURE).clamp(min=0.0), 0.0)

    def _order(self, view: RowView, confidence: Tensor) -> Tensor:
        return order_of(confidence, view.chosen("order", "sequential"))

    def _threshold(self, view: RowView) -> Tensor:
        return view.parameters["threshold"]


def order_of(confidence: Tensor, sequential: Tensor) -> Tensor:
    """[rows, W] float32: what a step decides first has the greatest one. sequential: [rows] bool, left to right."""
    leftmost = -torch.arange(confidence.shape[1], device=confidence.device).float()
    return torch.where(sequential[:, None], leftmost, confidence)


def single_step(masks: Tensor, order: Tensor, confidence: Tensor, threshold: Tensor) -> Tensor:
    """[rows, W] bool: what one step decides of `masks`, the first one in order and all above `threshold` ([rows], below
    0: none)."""
    first = ranks(torch.where(masks, order, -torch.inf)) == 0
    above = (threshold >= 0)[:, None] & (confidence > threshold[:, None])
    return masks & (first | above)


def branches(masks: Tensor, order: Tensor, count: int) -> Tensor:
    """[rows, count, W] bool: branch k has the first k of `masks` in order decided."""
    rank = ranks(torch.where(masks, order, -torch.inf))
    index = torch.arange(count, device=masks.device)
    return masks[:, None] & (rank[:, None] < index[:, None])


def furthest(states: Tensor, targets: Tensor, ran: Tensor, only_next: Tensor) -> tuple[Tensor, Tensor]:
    """The last state that single steps from state 0 reach, and how many states they pass, that one included.

    states, targets: [rows, K, W] ids, UNDECIDED where there is none; a step on state k gives exactly targets[:, k].
    ran: [rows, K] bool, states of which targets are known. only_next: [rows] bool, rows whose steps may not leave out
    a state. Returns [rows] int64 twice. (FreeDave's `draft_verification`, exact match.)
    """
    count = states.shape[1]
    index = torch.arange(count, device=states.device)
    same = (targets[:, :, None] == states[:, None]).all(dim=3) & ran[:, None]
    ahead = index > index[:, None]
    same = same & torch.where(only_next[:, None, None], index == index[:, None] + 1, ahead)
    best = torch.zeros(states.shape[0], dtype=torch.int64, device=states.device)
    steps = torch.ones_like(best)
    for _ in range(count - 1):
        there = same.gather(1, best[:, None, None].expand(-1, 1, count))[:, 0]
        reached = torch.where(there, index, 0).amax(dim=1)
        steps = steps + (reached > best).long()
        best = torch.maximum(best, reached)
    return best, steps
