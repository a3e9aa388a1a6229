"""The processes that hold one model together, and what they tell each other within a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.norm import add_rms_norm

from .peers import PeerSums

if TYPE_CHECKING:
    from linocut.kernels.letters_triton import Letters

# torch 2.13 renames it.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """This process is `rank` of `size`, of torch.distributed's default group, with a device of its own.

    Every rank calls the same methods in the same order, and all get the same bits back. A rank that is alone gets its
    own, and has no device yet.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.peers: PeerSums | None = None  # sum what they take

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, contiguous; perhaps in the place of `x`."""
        if self.size == 1:
            return x
        x = x.contiguous()
        if self.peers is not None and self.peers.take(x):
            return self.peers.sum(x)
        dist.all_reduce(x)
        return x

    def letters(self, like: Tensor, backend: Backend) -> Letters | None:
        """What the others are sent parts of a sum by, [rows, size] as `like` is; None where it takes no letters."""
        return self.peers.letters(like) if self.peers is not None and backend == "triton" else None

    def sum_and_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        fused: bool,
        backend: Backend,
        *,
        sent: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`add_rms_norm` of the sum over the ranks: x, residual: [rows, size]. sent: by `letters`, to all others."""
        if self.peers is not None and self.letters(x, backend) is not None:
            return self.peers.sum_and_norm(x, residual, weight, eps, fused, sent)
        assert not sent, "what was sent waits to be read"
        return add_rms_norm(self.sum(x), residual, weight, eps, fused, backend=backend)

    def gather(self, x: Tensor) -> Tensor:
        """[size, *shape of x]: every rank's `x`, all of one shape, in their order."""
        if self.size == 1:
            return x[None]
        # One concatenated output: gloo has no other form of it.
        found = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _gather(found, x.contiguous())
        return found.view(self.size, *x.shape)

    def least(self, value: int) -> int:
        """The least `value` of any rank; the host waits for it."""
        if self.size == 1:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)


ALONE = Ranks()
