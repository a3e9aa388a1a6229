"""Products of few rows with a weight matrix, which are bound by reading the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backend import Backend

# Rows up to which the Triton kernel measured faster than cuBLAS.
MOST_ROWS = 32


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "torch") -> Tensor:
    """x @ weight.T + bias: [rows, inner] -> [rows, features] in x's dtype, sums in float32.

    x: rows of any stride; weight: [features, inner], contiguous; bias: [features] or None. The Triton kernel takes up
    to 128 rows and an inner size that is a multiple of 128, and adds up along it in one order.
    """
    if backend == "triton":
        from .projection_triton import triton_projection

        return triton_projection(x, weight, bias)
    return linear(x, weight, bias)


def is_faster(rows: int, weight: Tensor, processors: int) -> bool:
    """Whether the Triton kernel measured faster than cuBLAS on an H200, or as fast (docs/kernels.md); from sizes alone.

    At 32 rows it reads a matrix of many tiles at 88 to 98 % of what the memory gives, cuBLAS at 82 to 94 %. Of products
    that are few tiles it is faster at those that are alone on their processors for long enough.
    """
    features, inner = weight.shape
    if not 0 < rows <= MOST_ROWS or inner % 128 or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    tiles = features // 64
    longest = 4096 if rows > 16 else 9472
    alone = 32 <= tiles <= 3 * processors // 5 and 3072 <= inner <= longest and inner % 256 == 0
    return tiles >= 2 * processors or alone
