"""Which positions a row runs next, for the two geometries of the families: blocks, and a causal frontier."""

from __future__ import annotations

import torch

from ..family import FamilyTraits
from .view import RowView, Span


def plan_block(view: RowView, traits: FamilyTraits) -> Span:
    """Clean positions without K/V, and the active block behind them, in one forward.

    The clean part is the prompt, or the block just finished: its commit is fused with the next block's first denoise
    step, exact since final tokens never see that block. Shifted families learn the block's first token from the clean
    rows. Block-causal ones were trained to know it while they denoise, so there the clean part runs alone and asks
    about that one position.

    Under token-causal attention a decided token is final as soon as all before it are: clean rows then reach up to the
    first undecided position, and in shifted families the last of them says what stands there (`opening`).

    With `sub_block_cache` a refinement runs only its sub-block, on the other sub-blocks' K/V as of the last whole-block
    forward, as long as the sub-block's first position is decided (Fast-dLLM v2, `generate(use_block_cache=True)`).
    """
    block = traits.block_size
    undecided = ~view.decided
    offsets = torch.arange(block, device=view.start.device, dtype=torch.int32)

    if traits.commit_seeds:
        seeding = undecided[:, 0] & (view.start > 0)
    else:
        seeding = torch.zeros_like(view.fresh)

    size = view.parameters["sub_block_size"]
    size = torch.where(size > 0, size, traits.sub_block_size)
    low = undecided.int().argmax(dim=1).int() // size * size
    inside = (offsets >= low[:, None]) & (offsets < (low + size)[:, None])
    targets = torch.where(seeding[:, None], offsets == 0, undecided & inside)

    first_known = view.decided.gather(1, low.long()[:, None])[:, 0]
    alone = view.fresh & view.parameters["sub_block_cache"] & first_known & ~seeding
    first = undecided.int().argmax(dim=1).int()
    clean_end = view.start + first if traits.context == "token-causal" else view.start
    opening = torch.zeros_like(undecided)
    if traits.commit_opens:
        opening = (offsets == first[:, None]) & undecided & (clean_end > 0)[:, None]
    run_start = torch.where(alone, view.start + low, view.final_len)
    run_end = torch.where(alone, view.start + low + size, view.start + block)
    run_end = torch.where(seeding, view.start, run_end)
    return Span(run_start, run_end, clean_end, targets, seeding, opening)


def plan_frontier(view: RowView, traits: FamilyTraits) -> Span:
    """Token-causal families: the last token is fed again with drafts behind it; row p - 1 predicts position p."""
    window = view.tokens.shape[1]
    offsets = torch.arange(window, device=view.start.device, dtype=torch.int32)
    length = torch.minimum(view.parameters["draft_length"], view.limit - view.start)
    return Span(
        run_start=view.final_len,
        run_end=view.start + length - 1,
        clean_end=view.start,
        targets=offsets < length[:, None],
        seeding=torch.zeros_like(view.fresh),
        opening=torch.zeros_like(view.decided),
    )
