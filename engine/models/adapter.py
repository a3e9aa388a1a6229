"""The gated adapter: low-rank weights that act on rows which are not final, and on no other.

Final rows pass through the autoregressive weights alone, so what they say, and the K/V they leave, is that model's
own. (Gated LoRA: I-DLM, arXiv 2604.11035; `linocut convert` trains it.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .linear import pack_linear

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
    """Which rows of a forward an adapter acts on."""

    def __init__(self, noisy: Tensor, dtype: torch.dtype) -> None:
        """noisy: [tokens] bool."""
        self.rows: Tensor | slice | None = None
        self.closed = False  # on the CPU: no row is noisy
        if noisy.device.type == "cpu":
            # Reading the flags costs a CPU nothing, and skipping rows saves their work.
            rows = noisy.nonzero()[:, 0]
            first, count = int(rows[0]) if len(rows) else 0, len(rows)
            self.closed = count == 0
            together = self.closed or int(rows[-1]) - first + 1 == count
            self.rows = slice(first, first + count) if together else rows
        else:
            self.factor = noisy[:, None].to(dtype)


class Adapter:
    """y += up(down(x)) on the gate's rows. down: [rank, in], up: [out, rank] with the scale folded in."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        # Never int8: matrices this small gain nothing by it, and lose to the operations around the product.
        self._down: Linear = pack_linear(down, None, "none")
        self._up: Linear = pack_linear(up, None, "none")

    def add(self, y: Tensor, x: Tensor, gate: Gate) -> Tensor:
        """x: [tokens, in], y: [tokens, out], changed in place on the CPU; the sum is returned."""
        if gate.closed:
            return y
        if gate.rows is None:
            return y + self._up(self._down(x) * gate.factor)
        if isinstance(gate.rows, slice):
            y[gate.rows].add_(self._up(self._down(x[gate.rows])))
            return y
        return y.index_add_(0, gate.rows, self._up(self._down(x[gate.rows])))


def read_adapter(weights: Weights, name: str, inputs: int, outputs: int, rank: int) -> Adapter:
    """The adapter of the packed projection `name` (model.layers.N.self_attn.qkv_proj, ...). Raises ModelError."""
    return Adapter(
        weights.get(f"{name}.adapter.down", (rank, inputs)), weights.get(f"{name}.adapter.up", (outputs, rank))
    )
