"""What a strategy sees of a step and what it answers: batched tensors over the rows of one strategy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowView:
    """The rows of one strategy; window tensors cover positions start .. start + W - 1.

    slots: [rows] int64. start, final_len, prompt_len, limit, step: [rows] int32 (see RowState).
    tokens: [rows, W] int32; decided: [rows, W] bool. fresh: [rows] bool. drafts: [rows] int32, how many of the window's
    tokens are drafts; draft_confidence: [rows, MAX_DRAFT] float32; row_cost: [rows] float32. parameters: name ->
    [rows].
    """

    slots: Tensor
    start: Tensor
    final_len: Tensor
    prompt_len: Tensor
    limit: Tensor
    step: Tensor
    tokens: Tensor
    decided: Tensor
    fresh: Tensor
    drafts: Tensor
    draft_confidence: Tensor
    row_cost: Tensor
    parameters: dict[str, Tensor]


@dataclass
class Span:
    """Which positions a row runs next, and which it asks about.

    run_start, run_end: [rows] int32. clean_end: [rows] int32, rows below it hold final tokens, so that their K/V is
    final after the forward. targets: [rows, W] bool, window positions whose statistics are needed. seeding: [rows]
    bool, the only target is the block's first position, which the clean forward before it predicts. opening: [rows,
    W] bool, targets that a clean row predicts.
    segments: [rows, S] int32 or None: draft segments behind the span, in order; each holds the number of drafts that
    its masks see, -1 where there is none.
    """

    run_start: Tensor
    run_end: Tensor
    clean_end: Tensor
    targets: Tensor
    seeding: Tensor
    opening: Tensor
    segments: Tensor | None = None


@dataclass
class WindowStatistics:
    """Statistics on the window grid. candidates: [rows, W] bool, where the others mean anything.

    token: [rows, W] int64, proposed id. confidence: [rows, W] float32, -inf elsewhere.
    """

    candidates: Tensor
    token: Tensor
    confidence: Tensor


@dataclass
class Decision:
    """commit: [rows, W] bool, positions decided now; tokens: [rows, W] their ids.

    drafts: [rows, W] ids to stand at undecided positions, counted from the new `start`; None keeps what is there.
    accepted: [rows] int64, how many of the drafts that masks made were right; None where masks make none.
    """

    commit: Tensor
    tokens: Tensor
    drafts: Tensor | None = None
    accepted: Tensor | None = None
