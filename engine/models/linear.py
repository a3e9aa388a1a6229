"""Linear layers, packed for the device (placeholder until measured)."""
from __future__ import annotations
from collections.abc import Callable
from typing import Literal
from torch import Tensor
from torch.nn.functional import linear

def pack_linear(weight: Tensor, bias: Tensor | None, mode: Literal["none", "int8"]) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, weight, bias)
