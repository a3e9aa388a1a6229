"""Linear layers on a Hopper GPU: products of few rows are a kernel of ours, all others torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from linocut.kernels.norm import silu_and_mul
from linocut.kernels.projection import project, suits

from .linear import DenseLinear


def can_read_ahead(device: torch.device) -> bool:
    """Whether the kernel is for this device: it is tuned for Hopper, and asks for weights as Hopper can."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


class FewRowsLinear(DenseLinear):
    """x @ weight.T + bias: [rows, in] -> [rows, out]. Among up to 64 rows, a row's result is its own, bit for bit."""

    @classmethod
    def over(cls, dense: DenseLinear) -> FewRowsLinear:
        """The same layer; shares the weights."""
        return cls(dense._weight, dense._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if suits(x.shape[0], self._weight):
            return project(x, self._weight, self._bias, backend="triton")
        return super().__call__(x)

    def gated(self, x: Tensor) -> Tensor:
        """silu(first half of the outputs) * second half: [rows, in] -> [rows, out / 2]."""
        if self._bias is None and suits(x.shape[0], self._weight, gated=True):
            return project(x, self._weight, gated=True, backend="triton")
        return silu_and_mul(self(x), backend="triton")
