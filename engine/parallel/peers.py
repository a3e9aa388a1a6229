"""Sums over the GPUs of one host that reach each other's memory."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from linocut.kernels.norm import add_rms_norm
from linocut.kernels.projection import MOST_ROWS

from ..models.few_rows import FewRowsLinear, has_few_rows_kernel

if TYPE_CHECKING:
    from linocut.kernels.letters_triton import Letters

    from .ranks import Ranks

log = logging.getLogger("linocut.engine")

# Bytes that a rank reads of the others for a sum, at most: beyond, NCCL moves less and is as fast.
_MOST = 1 << 20
# Rows, 32-bit words of each, and ranks that write to each other, which one kernel sums and normalises.
_ROWS, _WORDS, _RANKS = 64, 8192, 8
# The kernel moves as much at a time.
_ALIGNED = 16
_TRIALS = 48


class PeerSums:
    """A sum of few numbers as one kernel of a few microseconds: every rank reads what all others have to add.

    PyTorch's symmetric memory; NCCL takes two to three times as long for as little, twice in every layer. All ranks add
    up in the same order, so that they have the same bits. A later sum may begin as soon as this one has been launched.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        """Every rank of the default group, `size` in all, does so at the same time. Raises RuntimeError."""
        import torch.distributed._symmetric_memory as symmetric

        group = dist.group.WORLD
        if group is None:
            raise RuntimeError("there is no group of ranks")
        self._most, self._group = _MOST // (size - 1), group.group_name
        self._buffers = {}
        for dtype in (torch.bfloat16, torch.float32):  # what the kernel takes
            buffer = symmetric.empty(self._most // dtype.itemsize, dtype=dtype, device=device)
            symmetric.rendezvous(buffer, group)
            self._buffers[dtype] = buffer
        has_triton = find_spec("triton") is not None
        self._letters = self._exchange(symmetric, device, size) if has_triton and size <= _RANKS else None

    def _exchange(self, symmetric: ModuleType, device: torch.device, size: int) -> Letters:
        from linocut.kernels.letters_triton import Letters

        memory = symmetric.empty(2 * size * _ROWS * _WORDS, dtype=torch.int64, device=device)
        handle = symmetric.rendezvous(memory, dist.group.WORLD)
        memory.zero_()
        self._memory = memory, handle
        addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
        turns = torch.zeros(_ROWS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.barrier()  # nobody writes before all are zeros
        return Letters(addresses, turns, handle.rank, size, _ROWS, _WORDS)

    def take(self, x: Tensor) -> bool:
        return x.dtype in self._buffers and 0 < x.nbytes <= self._most and x.nbytes % _ALIGNED == 0

    def sum(self, x: Tensor) -> Tensor:
        """x: contiguous, one that they `take`. Returns a new tensor."""
        # The operator that also copies signals the others before all of a block's threads have stored their part.
        buffer = self._buffers[x.dtype][: x.numel()].copy_(x.view(-1))
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", self._group)
        return total.view(x.shape)

    def letters(self, like: Tensor) -> Letters | None:
        """For parts of a sum of `like`'s shape and dtype, where there are such."""
        return self._letters if self._letters is not None and self._letters.take(like) else None

    def sum_and_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, fused: bool, sent: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`Ranks.sum_and_norm` of rows that there are `letters` for."""
        from linocut.kernels.peer_norm_triton import triton_peer_add_rms_norm

        assert self._letters is not None
        return triton_peer_add_rms_norm(x, residual, weight, eps, fused, self._letters, sent)


def peer_sums(ranks: Ranks) -> PeerSums | None:
    """For the ranks of one host, whose GPUs are numbered as they are; None, for all of them, where NCCL has to do."""
    device, rank = ranks.device, ranks.rank
    if device is None or device.type != "cuda" or torch.version.hip is not None:
        return None
    others = [device.index - rank + other for other in range(ranks.size) if other != rank]
    if not ranks.least(all(torch.cuda.can_device_access_peer(device, other) for other in others)):
        return None
    found = None
    try:
        found = PeerSums(device, ranks.size)
    except RuntimeError as error:
        log.warning("sums over the GPUs are NCCL's, since these do not share memory: %s", str(error)[:300])
    if not ranks.least(found is not None) or found is None:
        return None
    # A vote behind each: all ranks take part in a trial, or none does.
    for trial in (_sums_right, _products_right):
        if not ranks.least(trial(found, rank, device)):
            log.warning("sums over the GPUs are NCCL's, since a trial went wrong")
            return None
    return found


def _sums_right(peers: PeerSums, rank: int, device: torch.device) -> bool:
    """Whether sums one upon another, of several sizes, are NCCL's."""
    right = torch.ones((), dtype=torch.bool, device=device)
    for turn in range(_TRIALS):
        # Small integers, which any order sums to the same.
        x = torch.arange(8 << turn % 12, device=device).add_(rank + turn).remainder_(61).float()
        expected = x.clone()
        dist.all_reduce(expected)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            part, whole = x.to(dtype), expected.to(dtype)
            right &= (peers.sum(part) == whole).all()
            rows, whole = part.view(1 << turn % 4, -1), whole.view(1 << turn % 4, -1)
            if peers.letters(rows) is not None:
                residual, weight = whole.flip(0).sub(30), whole[0].remainder(3).add(1)
                torch.cuda.synchronize(device)  # the kernel expects weights that nobody writes any more
                normed, total = peers.sum_and_norm(rows, residual, weight, 1e-6, False)
                expected_norm, expected_total = add_rms_norm(whole, residual, weight, 1e-6, False)
                right &= (total == expected_total).all()
                right &= torch.isclose(normed, expected_norm, rtol=tolerance, atol=tolerance).all()
    return bool(right)


def _products_right(peers: PeerSums, rank: int, device: torch.device) -> bool:
    """Whether sums of products that send their result are NCCL's, of tiles of one program, of three and of two."""
    right = torch.ones((), dtype=torch.bool, device=device)
    # Each output is one of the inputs, so that all sums are exact.
    some = torch.eye(256, dtype=torch.bfloat16, device=device).repeat(8, 1)
    residual, norm = some.new_zeros(MOST_ROWS, len(some)), some.new_ones(len(some))
    for weight in (some, some.repeat(1, 12), some.repeat(1, 33)) if has_few_rows_kernel(device) else ():
        product = FewRowsLinear(weight, None)
        for rows in (1, 3, MOST_ROWS):
            letters = peers.letters(residual[:rows])
            if letters is None:
                continue
            x = some.new_zeros(rows, weight.shape[1] // 256, 256)
            numbers = torch.arange(rows * 256, device=device).add_(rank + rows).remainder_(61)
            x[:, rows % x.shape[1]] = numbers.view(rows, 256)
            whole = linear(x.view(rows, -1), weight)
            dist.all_reduce(whole)
            torch.cuda.synchronize(device)
            part = product.sent(x.view(rows, -1), letters)
            _, total = peers.sum_and_norm(part, residual[:rows], norm, 1e-6, False, sent=True)
            right &= (total == whole).all()
    return bool(right)
