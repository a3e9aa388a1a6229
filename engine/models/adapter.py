"""The gated adapter: low-rank weights that act on rows which are not final, and on no other.

Final rows pass through the autoregressive weights alone, so what they say, and the K/V they leave, is that model's
own. (Gated LoRA: I-DLM, arXiv 2604.11035; `linocut convert` trains it.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.layers_native import Projection
from linocut.kernels.low_rank import gated_low_rank
from linocut.kernels.norm import silu_and_mul
from linocut.kernels.projection import LowRank

from .few_rows import FewRowsLinear
from .linear import DenseLinear, NativeInt8Linear, NativeLinear, pack_linear

FILE = "adapter.safetensors"
MASK_EMBEDDING = "model.mask_embedding"

Linear = Callable[[Tensor], Tensor]
# The rows, then the columns, that are wanted of a tensor; all of those that are not named.
Part = tuple[slice, ...]


class Weights(Protocol):
    """Where tensors come from: a checkpoint, or a generator of random ones."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor: ...


class WeightsInParts(Weights, Protocol):
    """The same, where a part of a tensor can be read alone."""

    def get(self, name: str, shape: tuple[int, ...], part: Part = ()) -> Tensor: ...


class Gate:
    """Which rows of a forward an adapter acts on. flags: [tokens] bool."""

    def __init__(self, flags: Tensor, dtype: torch.dtype) -> None:
        self.flags = noisy = flags
        self.rows: Tensor | slice | None = None
        self.closed = False  # on the CPU: no row is noisy
        if noisy.device.type == "cpu":
            # Reading the flags costs a CPU nothing, and skipping rows saves their work.
            self.indices = rows = noisy.nonzero()[:, 0]
            first, count = int(rows[0]) if len(rows) else 0, len(rows)
            self.closed = count == 0
            together = self.closed or int(rows[-1]) - first + 1 == count
            self.rows = slice(first, first + count) if together else rows
        else:
            self.factor = noisy[:, None].to(dtype)


class Adapter:
    """base(x) + up(down(x)) on the gate's rows. down: [rank, in], up: [out, rank] with the scale folded in."""

    def __init__(self, base: Linear, down: Tensor, up: Tensor, backend: Backend) -> None:
        self.base, self._both, self._low_rank = base, None, None
        self._backend = backend
        if backend == "triton" and isinstance(base, DenseLinear):
            # One product for both, as few rows are bound by the number of kernels; the base is a part of it.
            self._both, self._raised = DenseLinear.stacked(base, down), up
            self.base = self._both.first(up.shape[0])
            if isinstance(self._both, FewRowsLinear) and LowRank.fits(up.shape[1]):
                self._low_rank = LowRank(up)
            return
        # In integers where one call does all. torch's int8 gains nothing on matrices this small, and loses to the
        # operations around the product.
        mode: Literal["none", "int8"] = "int8" if isinstance(base, NativeInt8Linear) else "none"
        self._down: Linear = pack_linear(down, None, mode, backend)
        self._up: Linear = pack_linear(up, None, mode, backend)

    def __call__(self, x: Tensor, gate: Gate | None) -> Tensor:
        """[tokens, in] -> [tokens, out], rows of any stride. gate: None closes it for all rows."""
        if gate is None or gate.closed:
            return self.base(x)
        if self._both is not None:
            found = self._in_one_kernel(x, gate)
            return gated_low_rank(self._both(x), self._raised, gate.flags, backend="triton") if found is None else found
        if isinstance(self.base, NativeInt8Linear) and isinstance(self._down, NativeInt8Linear):
            assert isinstance(self._up, NativeInt8Linear)
            return self.base.weight.multiply(x, (self._down.weight, self._up.weight), gate.indices)
        y = self.base(x)
        if gate.rows is None:
            return y + self._up(self._down(x) * gate.factor)
        if isinstance(gate.rows, slice):
            if isinstance(self._up, NativeLinear) and isinstance(self._down, NativeLinear):
                self._up.weight.add_low_rank(self._down.weight, x, y, gate.rows)
            else:
                y[gate.rows].add_(self._up(self._down(x[gate.rows])))
            return y
        return y.index_add_(0, gate.rows, self._up(self._down(x[gate.rows])))

    def activated(self, x: Tensor, gate: Gate | None) -> Tensor:
        """`silu_and_mul` of it: [tokens, in] -> [tokens, out / 2]."""
        if gate is None or gate.closed:
            return activated(self.base, x, self._backend)
        found = self._in_one_kernel(x, gate, activate=True)
        return silu_and_mul(self(x, gate), backend=self._backend) if found is None else found

    def _in_one_kernel(self, x: Tensor, gate: Gate, activate: bool = False) -> Tensor | None:
        """The whole of it, where there is a kernel for as many rows."""
        if self._low_rank is None or not isinstance(self._both, FewRowsLinear) or not self._both.takes_update(x):
            return None
        return self._both.updated(x, self._low_rank, gate.flags, activate)

    def native(self) -> Projection | None:
        """Base, down and up, where all of them are for the kernels in C, and of one kind."""
        parts = self.base, self._down, self._up
        for kind in (NativeInt8Linear, NativeLinear):
            if all(isinstance(part, kind) for part in parts):
                base, down, up = (part.weight for part in parts if isinstance(part, NativeInt8Linear | NativeLinear))
                return base, down, up
        return None


def activated(linear: Linear, x: Tensor, backend: Backend) -> Tensor:
    """`silu_and_mul` of a linear layer's result: [rows, in] -> [rows, out / 2]."""
    return linear.activated(x) if isinstance(linear, FewRowsLinear) else silu_and_mul(linear(x), backend=backend)


def read_adapter(
    weights: Weights, name: str, base: Linear, inputs: int, outputs: int, rank: int, backend: Backend
) -> Adapter:
    """The adapter of the packed projection `name` (model.layers.N.self_attn.qkv_proj, ...). Raises ModelError."""
    down = weights.get(f"{name}.adapter.down", (rank, inputs))
    return Adapter(base, down, weights.get(f"{name}.adapter.up", (outputs, rank)), backend)
