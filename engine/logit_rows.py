"""Which hidden states of a forward become logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LogitRows:
    """Which hidden states become logits, and for which position of which row.

    source: [M] int64, index into the flat batch. row: [M] int64, index into the plan's rows; slot: its state slot.
    offset: [M] int64 in the row's window; position: [M] int32. valid: [M] bool; the host may reserve too many. ahead:
    [M] int32, by how many steps of its row an entry is ahead, None: none is.
    """

    source: Tensor
    row: Tensor
    slot: Tensor
    offset: Tensor
    position: Tensor
    valid: Tensor
    ahead: Tensor | None = None

    def at(self, part: slice | Tensor) -> LogitRows:
        return LogitRows(
            self.source[part],
            self.row[part],
            self.slot[part],
            self.offset[part],
            self.position[part],
            self.valid[part],
            None if self.ahead is None else self.ahead[part],
        )


# Gives the logits of rows, [M, width of a rank's share]; the caller may change them in place.
ToLogits = Callable[[LogitRows], Tensor]


def window_index(rows: LogitRows, count: int, window: int) -> Tensor:
    """[count, window] int64: the entry of `rows` that asks about a row's window position; 0 where none does."""
    size = count * (window + 1)
    at = rows.row * (window + 1) + torch.where(rows.valid & (rows.offset < window), rows.offset, window)
    entries = torch.arange(rows.row.shape[0], device=rows.row.device)
    return entries.new_zeros(size).scatter_(0, at, entries).view(count, window + 1)[:, :window]
