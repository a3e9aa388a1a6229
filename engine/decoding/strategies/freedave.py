"""FreeDave: states that static decoding would reach next are drafted and verified side by side."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ..memory import Memory
from ..ranking import ranks
from ..strategy import GridParams, GridStrategy, Values
from ..view import Decision, RowView, Span, WindowStatistics

# Rows that the branches of a sequence may take together.
MAX_BRANCH_ROWS = 256
DRAFT, SURE = "freedave_draft", "freedave_confidence"


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
    row_cost: (
        Annotated[
            float,
            Meta(
                ge=0.0,
                le=1.0,
                description="what a row must promise, in tokens, to be run; 0 runs all; default: by device and load",
            ),
        ]
        | None
    ) = None


class FreeDave(GridStrategy):
    """Draft the next states of one-by-one decoding from one set of logits, run them, keep the furthest that is right.

    The block's own slots hold the present state. A branch is a draft segment behind it: the block with the next one,
    two, ... masks filled from the logits of the step before, seeing the prefix and itself. A step on the present state
    that gives exactly the first branch makes that branch the present state, and so on; the last state's step is what is
    committed, and its logits draft the next branches. So the text, also a sampled one, is that of single steps whatever
    was drafted, and the number of branches may follow the load: one is run while the probability that it is reached
    pays for its rows. After arXiv 2510.00294, whose first branch is our present state.
    """

    name = "freedave"
    source = "FreeDave, arXiv 2510.00294"
    Params = FreeDaveParams
    branches = True

    def refusal(self, traits: FamilyTraits) -> str:
        if traits.context == "token-causal" and traits.mask_id is not None:
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

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        span = super().plan(view, traits)
        masks = span.targets & view.masked & ~span.seeding[:, None]
        draft, rank, sure = self._drafted(view, masks)
        most = MAX_BRANCH_ROWS // traits.block_size
        index = torch.arange(1, min(most, 15) + 1, device=rank.device)
        # Branch k fills the k best masks; one that fills all needs no forward of its own.
        filled = masks[:, None, :] & (rank[:, None, :] < index[:, None])
        left = masks.sum(dim=1, keepdim=True) > index
        reach = torch.where(filled, sure[:, None, :], 1.0).prod(dim=2)
        worth = reach >= view.row_cost[:, None] * traits.block_size
        wanted = left & worth & (index < view.parameters["branches"][:, None]) & (view.step > 0)[:, None]
        # Nested, so that the first one that is not run ends them.
        span.segments = torch.where(wanted.int().cumprod(dim=1) > 0, 0, -1).int()
        span.segment_tokens = torch.where(filled, draft[:, None, :].int(), view.tokens[:, None, :])
        return span

    def choose(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        masks = statistics.candidates & view.masked
        draft, rank, _ = self._drafted(view, masks)
        commit = self._step(view, masks, statistics.confidence)
        tokens, sure = statistics.token, statistics.confidence
        taken = torch.ones_like(view.step)
        held = tokens
        state = torch.where(commit, tokens, view.tokens)
        if statistics.segments is not None:
            found = statistics.segments
            right = torch.ones_like(view.fresh)
            for index in range(found.token.shape[1]):
                filled = masks & (rank < index + 1)
                branch = torch.where(filled, draft, view.tokens)
                ran = found.candidates[:, index].any(dim=1)
                right = right & ran & ((commit == filled) & (state == branch)).all(dim=1)
                left = masks & ~filled
                token, confidence = found.token[:, index], torch.where(left, found.confidence[:, index], -torch.inf)
                reached = filled | self._step(view, left, confidence)
                there = right[:, None]
                commit = torch.where(there, reached, commit)
                held = torch.where(there, torch.where(filled, draft, token), held)
                state = torch.where(there, torch.where(filled, draft, torch.where(reached, token, view.tokens)), state)
                tokens, sure = torch.where(there, token, tokens), torch.where(there, confidence, sure)
                taken = taken + right.int()
        view.remember(DRAFT, tokens)
        view.remember(SURE, sure)
        return Decision(commit, held, steps=taken)

    def _drafted(self, view: RowView, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, W] each: drafted ids, the order in which single steps would decide them, their confidence."""
        sure = torch.where(masks, view.recall(SURE).clamp(min=0.0), -1.0)
        return view.recall(DRAFT), ranks(self._score(view, masks, sure)), sure.clamp(min=0.0)

    def _score(self, view: RowView, masks: Tensor, confidence: Tensor) -> Tensor:
        """What a step decides first has the greatest one."""
        leftmost = -view.offsets.float().expand_as(confidence)
        score = torch.where(view.chosen("order", "sequential")[:, None], leftmost, confidence)
        return torch.where(masks, score, -torch.inf)

    def _step(self, view: RowView, masks: Tensor, confidence: Tensor) -> Tensor:
        """[rows, W] bool: what one step decides of `masks`."""
        best = masks & (ranks(self._score(view, masks, confidence)) == 0)
        threshold = view.parameters["threshold"][:, None]
        return best | (masks & (threshold >= 0) & (confidence > threshold))
