"""Linear layers on a Hopper GPU: products of few rows are a kernel of ours where it is the faster one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linocut.kernels.norm import silu_and_mul
from linocut.kernels.projection import LowRank, is_faster, is_worth_sending, project, reserve

from .linear import DenseLinear

if TYPE_CHECKING:
    from linocut.kernels.letters_triton import Letters


class FewRowsLinear(DenseLinear):
    """x @ weight.T + bias: [rows, in] -> [rows, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
        reserve(weight.device)

    @classmethod
    def over(cls, dense: DenseLinear) -> FewRowsLinear:
        """The same layer; shares the weights."""
        return cls(dense._weight, dense._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if is_faster(x.shape[0], self._weight, self._processors):
            return project(x, self._weight, self._bias, backend="triton")
        return super().__call__(x)

    def activated(self, x: Tensor) -> Tensor:
        """`silu_and_mul` of it, [rows, in] -> [rows, out / 2]."""
        if is_faster(x.shape[0], self._weight, self._processors):
            return project(x, self._weight, self._bias, activate=True, backend="triton")
        return silu_and_mul(self(x), backend="triton")

    def takes_update(self, x: Tensor) -> bool:
        """Whether `updated` is for so many rows."""
        return is_faster(x.shape[0], self._weight, self._processors)

    def updated(self, x: Tensor, low_rank: LowRank, gated: Tensor, activate: bool) -> Tensor:
        """With a low-rank update, whose way down are the last rows of the weight (`project`)."""
        return project(x, self._weight, self._bias, low_rank=low_rank, gated=gated, activate=activate, backend="triton")

    def takes_letters(self, x: Tensor) -> bool:
        """Whether `sent` is for so many rows."""
        return is_worth_sending(x.shape[0], self._weight, self._processors)

    def sent(self, x: Tensor, letters: Letters) -> Tensor:
        """[rows, in] -> [rows, out]: this rank's part of a sum, written into the other ranks' memory, too."""
        from linocut.kernels.projection_triton import triton_projection

        return triton_projection(x, self._weight, self._bias, letters=letters)


def has_few_rows_kernel(device: torch.device) -> bool:
    """Whether the kernel is for this device: it was measured on Hopper alone."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
