"""`statistics.py` in C: of float32 logits on the CPU, the likeliest ids and the sum of all weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import library, takes
from .statistics import LOWEST, VocabPartials


def statistics_are_native(logits: Tensor) -> bool:
    """Whether the kernel takes these."""
    return takes(logits) and logits.is_contiguous() and logits.shape[1] > 0


def native_partials(logits: Tensor, vocab_start: int, scale: Tensor | None) -> VocabPartials:
    """`statistics.partial_statistics` in one slice, as far as greedy rows ask for it.

    logits: [M, width]; scale: [M] float32, what they are multiplied by, or None.
    """
    rows, width = logits.shape
    best = torch.empty(rows, dtype=torch.int64)
    maximum, total = torch.empty(2, 1, rows).unbind()
    library().native_vocabulary(
        *(logits.data_ptr(), None if scale is None else scale.data_ptr(), rows, width, LOWEST),
        *(best.data_ptr(), maximum.data_ptr(), total.data_ptr()),
    )
    best_logit = logits.gather(1, best[:, None])[None, :, 0]
    return VocabPartials(maximum=maximum, total=total, best_id=(best + vocab_start)[None], best_logit=best_logit)


def native_top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest ids of each row, all of them where there are fewer, and the probability that they cover.

    logits: [M, width]. Returns [M, count] int64, best first and the lowest id first on ties, NaN as if it were banned;
    and [M] float32, 0 where it is no number.
    """
    if not statistics_are_native(logits):
        logits = logits.float().contiguous()
    rows, width = logits.shape
    ids = torch.empty(rows, min(count, width), dtype=torch.int64)
    covered = torch.empty(rows)
    library().native_top(logits.data_ptr(), rows, width, ids.shape[1], ids.data_ptr(), covered.data_ptr())
    return ids, covered
