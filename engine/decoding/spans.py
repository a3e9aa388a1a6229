"""Which positions a row runs next, by the family's geometry: blocks on a grid, a canvas, a causal frontier."""

from __future__ import annotations

import torch
from torch import Tensor

from ..family import FamilyTraits
from .view import RowView, Span


def plan_grid(view: RowView, traits: FamilyTraits, asks_all: bool = False) -> Span:
    """The active block; with `asks_all` its decided positions behind the prompt are asked about, too."""
    span = plan_canvas(view, traits) if traits.context == "full" else plan_block(view, traits)
    if asks_all:
        asked = view.generated & ~predicted_by_kept(view, traits)
        span.targets = torch.where(span.seeding[:, None], span.targets, asked)
    return span


def predicted_by_kept(view: RowView, traits: FamilyTraits) -> Tensor:
    """[rows, W] bool: positions whose predicting row a step may do without, since its K/V is kept.

    Decided ones among them are not asked about: what a row is asked must not depend on whether a preemption makes it
    run that row again.
    """
    if traits.final_by_token:
        return view.decided.int().cumprod(dim=1).bool()
    if traits.logit_source == "own" and not traits.commit_seeds:
        return torch.zeros_like(view.decided)
    if traits.context == "full":
        return (view.offsets == 0) & ~view.chosen("cache", "none")[:, None]
    low, _ = sub_block(view, traits)
    cached = view.parameters["sub_block_cache"][:, None]
    return (view.offsets == 0) | (cached & (view.offsets == low[:, None]))


def sub_block(view: RowView, traits: FamilyTraits) -> tuple[Tensor, Tensor]:
    """[rows] int32 each: offset and length of the sub-block that holds the first undecided position."""
    size = view.parameters["sub_block_size"]
    size = torch.where(size > 0, size, min(traits.sub_block_size, traits.block_size))
    size = torch.minimum(size, view.block)
    return view.masked.int().argmax(dim=1).int() // size * size, size


def refined(view: RowView, traits: FamilyTraits) -> Tensor:
    """[rows, W] bool: the positions that are refined together now, a sub-block or all of a canvas's block."""
    if traits.context == "full":
        return view.inside
    low, size = sub_block(view, traits)
    return (view.offsets >= low[:, None]) & (view.offsets < (low + size)[:, None])


def plan_block(view: RowView, traits: FamilyTraits) -> Span:
    """Clean positions without K/V, and the active block behind them, in one forward.

    The clean part is the prompt, or the block just finished: its commit is fused with the next block's first denoise
    step, exact since final tokens never see that block. Shifted families learn the block's first token from the clean
    rows. Block-causal ones were trained to know it while they denoise, so there the clean part runs alone and asks
    about that one position; so it does in families whose blocks are denoised unshifted, but committed causally.

    Under token-causal attention a decided token may be final as soon as all before it are: clean rows then reach up to
    the first undecided position, and in shifted families the last of them says what stands there (`opening`).

    With `sub_block_cache` a refinement runs only its sub-block, on the other sub-blocks' K/V as of the last whole-block
    forward, as long as the sub-block's first position is decided (Fast-dLLM v2, `generate(use_block_cache=True)`).
    """
    undecided = view.masked
    if traits.commit_seeds:
        seeding = undecided[:, 0] & (view.start > 0)
    else:
        seeding = torch.zeros_like(view.fresh)

    low, size = sub_block(view, traits)
    targets = torch.where(seeding[:, None], view.offsets == 0, undecided & refined(view, traits))

    first_known = view.decided.gather(1, low.long()[:, None])[:, 0]
    alone = view.fresh & view.parameters["sub_block_cache"] & first_known & ~seeding
    first = undecided.int().argmax(dim=1).int()
    clean_end = view.start + first if traits.final_by_token else view.start
    opening = torch.zeros_like(undecided)
    if traits.commit_opens:
        opening = (view.offsets == first[:, None]) & undecided & (clean_end > 0)[:, None]
    run_start = torch.where(alone, view.start + low, view.final_len)
    run_end = torch.where(alone, view.start + low + size, view.start + view.block)
    run_end = torch.where(seeding, view.start, run_end)
    return Span(run_start, run_end, clean_end, targets, seeding, opening)


def plan_canvas(view: RowView, traits: FamilyTraits) -> Span:
    """Full attention: the whole canvas, or what the cache of the block leaves to run (Fast-dLLM v1, section 3).

    The first forward of a block runs everything, so that K/V of the rest is as fresh as a block can have it. The others
    run everything again (`cache` none), what stands from the block on (prefix) or the block alone (dual). Shifted
    families take a block's first token from that first forward: later ones do not run the row that predicts it.
    """
    cached = ~view.chosen("cache", "none")
    refresh = ~(cached & view.fresh)
    undecided = view.masked
    seeding = torch.zeros_like(view.fresh)
    if traits.logit_source == "previous":
        seeding = refresh & cached & undecided[:, 0]
    end = torch.where(view.chosen("cache", "dual"), torch.minimum(view.start + view.window, view.limit), view.canvas)
    return Span(
        run_start=torch.where(refresh, 0, view.start),
        run_end=torch.where(refresh, view.canvas, end),
        clean_end=torch.zeros_like(view.start),
        targets=torch.where(seeding[:, None], view.offsets == 0, undecided),
        seeding=seeding,
        opening=torch.zeros_like(undecided),
    )


def plan_blocks(view: RowView, begun: Tensor) -> Span:
    """Block-causal families: clean positions without K/V, and the blocks behind them that are begun, in one forward.

    No block sees a later one, and a block's K/V is final from the forward on that runs it once it and all before it
    are full. begun: [rows, W] bool, the first block or several.
    """
    return Span(
        run_start=view.final_len,
        run_end=view.start + (begun & view.inside).sum(dim=1).int(),
        clean_end=view.start,
        targets=view.masked & begun,
        seeding=torch.zeros_like(view.fresh),
        opening=torch.zeros_like(begun),
    )


def plan_frontier(view: RowView, length: Tensor) -> Span:
    """Token-causal families: the last token is fed again with drafts behind it; row p - 1 predicts position p.

    length: [rows] int32, rows to feed, the last token's included.
    """
    length = torch.minimum(length, view.limit - view.start)
    return Span(
        run_start=view.final_len,
        run_end=view.start + length - 1,
        clean_end=view.start,
        targets=view.offsets < length[:, None],
        seeding=torch.zeros_like(view.fresh),
        opening=torch.zeros_like(view.decided),
    )
