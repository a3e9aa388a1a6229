"""`norm.py` in C: contiguous float32 tensors on the CPU. In float32 both orders of rounding are one."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import library


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    size = weight.shape[0]
    library().native_rms_norm(x.data_ptr(), None, x.numel() // size, size, weight.data_ptr(), eps, None, out.data_ptr())
    return out


def native_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = weight.shape[0]
    library().native_rms_norm(
        *(x.data_ptr(), residual.data_ptr(), x.numel() // size, size, weight.data_ptr(), eps),
        *(total.data_ptr(), out.data_ptr()),
    )
    return out, total


def native_silu_and_mul(gate_up: Tensor) -> Tensor:
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    library().native_silu_and_mul(gate_up.data_ptr(), out.numel() // size, size, out.data_ptr())
    return out
