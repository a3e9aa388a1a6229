"""What a strategy remembers of a row from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """A tensor of [rows, *shape], one entry for every slot; zero for a new row."""

    shape: tuple[int, ...]
    dtype: torch.dtype
