"""Discrete Diffusion Forcing's pipelined blocks: the next ones are begun before the first is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from ...family import FamilyTraits
from ..ranking import ranks
from ..spans import plan_blocks
from ..strategy import MAX_BLOCK, GridParams, GridStrategy, Values
from ..view import Decision, RowView, Span, WindowStatistics

MAX_BLOCKS = 4


class PipelineParams(GridParams, frozen=True):
    """Positions above a threshold in several blocks at once, each begun when enough of the one before is decided.

    A block that is begun early sees masks where its model was trained to see text, unless it was trained for this (D2F,
    MBD-LMs): the text may be a worse one than `threshold` gives.
    """

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.9
    blocks: Annotated[int, Meta(ge=1, le=MAX_BLOCKS, description="blocks that a forward decides at most")] = 4
    begin: Annotated[float, Meta(ge=0.0, le=1.0, description="share of a block decided before the next is begun")] = 0.1
    press: Annotated[
        float, Meta(ge=0.0, le=1.0, description="share decided before the next one decides its best in any case")
    ] = 0.95


@dataclass
class _Stages:
    """block: [rows, W] int64, the block of a position; begun, pressed: [rows, W] bool, of its block; passed: [rows]
    int32, positions of the leading blocks that are full."""

    block: Tensor
    begun: Tensor
    pressed: Tensor
    passed: Tensor


class Pipeline(GridStrategy):
    """Threshold decoding of a window of blocks, which moves on by the full ones at its start.

    A block is begun once `begin` of the block before it is decided, if that holds no end of the text. It decides its
    best position in a forward where none passes the threshold only if `press` of the block before it is decided: its
    context is good enough then. All follows from what is decided, so nothing has to be remembered. After Discrete
    Diffusion Forcing (arXiv 2508.09192) and d3LLM (arXiv 2601.07568), on the attention that the model has.

    A block-causal model runs the blocks that are begun, and commits the full ones at the window's start in the forward
    that goes on with the others. On a canvas every forward runs what `cache` leaves of it.
    """

    name = "pipeline"
    source = "D2F, arXiv 2508.09192; d3LLM, arXiv 2601.07568"
    Params = PipelineParams

    def refusal(self, traits: FamilyTraits) -> str:
        if refusal := super().refusal(traits):
            return refusal
        if traits.context != "full" and traits.commit_seeds:
            return "a clean forward decides the first position of a block, so that none can begin before it"
        if traits.context == "token-causal":
            return "a token is final as soon as all before it are: `verify` looks beyond the block"
        return ""

    def bounds(self, traits: FamilyTraits) -> dict[str, dict[str, Any] | None]:
        # A window starts at some block, and its steps are of no single one.
        without = [name for name in GridParams.__struct_fields__ if name.startswith(("halt", "smoothing", "sub_block"))]
        changes = super().bounds(traits) | {"aligned": None, **{name: None for name in without}}
        if traits.context == "full":
            changes["block_length"] = {"default": min(traits.block_size, 32), "maximum": MAX_BLOCK // MAX_BLOCKS}
        else:
            most = max(min(MAX_BLOCKS, MAX_BLOCK // traits.block_size), 1)
            changes["blocks"] = {"default": most, "maximum": most}
        return changes

    def block(self, values: Values, traits: FamilyTraits) -> int:
        return int(values.get("block_length", traits.block_size))

    def window(self, values: Values, traits: FamilyTraits) -> int:
        return self.block(values, traits) * int(values["blocks"])

    def plan(self, view: RowView, traits: FamilyTraits) -> Span:
        begun = _stages(view, view.decided).begun
        if traits.context != "full":
            return plan_blocks(view, begun)
        span = super().plan(view, traits)
        span.targets = span.targets & (begun | span.seeding[:, None])
        return span

    def decide(self, view: RowView, statistics: WindowStatistics, traits: FamilyTraits) -> Decision:
        stages = _stages(view, view.decided)
        masks = statistics.candidates & view.masked
        score = torch.where(masks, statistics.confidence, -torch.inf)
        above = masks & (score > view.parameters["threshold"][:, None])
        rank = torch.where(masks, ranks(score), view.width)
        first = torch.full_like(rank, view.width).scatter_reduce(1, stages.block, rank, "amin")
        idle = _per_block(stages.block, above) == 0
        best = masks & (rank == first.gather(1, stages.block))
        commit = above | (best & idle.gather(1, stages.block) & stages.pressed)
        return Decision(commit, statistics.token, passed=_stages(view, view.decided | commit).passed)


def _per_block(block: Tensor, flags: Tensor) -> Tensor:
    """[rows, W] int32: how many positions of block j are flagged."""
    return torch.zeros_like(flags, dtype=torch.int32).scatter_add(1, block, flags.int())


def _stages(view: RowView, decided: Tensor) -> _Stages:
    block = (view.offsets // view.block[:, None]).long()
    size = _per_block(block, view.inside)
    # Shares are of what is generated. Behind the row's last block nothing is left to decide.
    asked = _per_block(block, view.generated)
    known = _per_block(block, decided & view.generated)
    done = torch.where(asked > 0, known / asked.clamp(min=1), 1.0)
    before = torch.nn.functional.pad(done, (1, 0), value=1.0)[:, :-1]
    begun = before >= view.parameters["begin"][:, None]
    if view.stops is not None:
        ended = (view.tokens[:, :, None] == view.stops[:, None, :]).any(dim=2) & decided & view.generated
        ends = _per_block(block, ended).cumsum(dim=1)
        begun = begun & (torch.nn.functional.pad(ends, (1, 0))[:, :-1] == 0)
    begun = begun.int().cumprod(dim=1).bool()
    pressed = begun & (before >= view.parameters["press"][:, None])
    full = (known >= asked).int().cumprod(dim=1).bool()
    passed = torch.where(full, size, 0).sum(dim=1).int()
    return _Stages(block, begun.gather(1, block), pressed.gather(1, block), passed)
