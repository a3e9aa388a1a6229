"""Products of few rows with a weight matrix, which are bound by reading the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backend import Backend
from .norm import silu_and_mul


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False, backend: Backend = "torch"
) -> Tensor:
    """x @ weight.T + bias; with `gated`, silu(first half) * second half of that, as SwiGLU has it.

    x: [rows, inner], rows of any stride; weight: [features, inner], contiguous; bias: [features] or None, None with
    `gated`. Returns [rows, features] or [rows, features / 2] in x's dtype, rounded as `linear` and then `silu_and_mul`
    do. The Triton kernel is for shapes that `suits`; a row's result does not depend there on how many rows there are.
    """
    if backend == "triton":
        from .projection_triton import triton_projection

        return triton_projection(x, weight, bias, gated=gated)
    y = linear(x, weight, bias)
    return silu_and_mul(y) if gated else y


def suits(rows: int, weight: Tensor, *, gated: bool = False) -> bool:
    """Whether the Triton kernel takes the product and measured faster than cuBLAS; from sizes alone."""
    if not 0 < rows <= 64 or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    features, inner = weight.shape
    return inner % 64 == 0 and features % 8 == 0
