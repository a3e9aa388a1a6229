"""The sum over ranks with its norm, and products that send it: ranks are processes here, and their memory is shared."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import linear

from linocut.kernels.norm import add_rms_norm

pytest.importorskip("triton", reason="triton is not installed")

# Turns begin a little before their number has no more bits.
TURNS, ROWS, WORDS, FIRST = 48, 3, 128, 2**31 - 20


def _rank(rank: int, memories: list[Tensor], kinds: list[tuple[torch.dtype, int]], answers: Any) -> None:
    from linocut.kernels.interpreter import use_interpreter

    use_interpreter()
    from linocut.kernels.letters_triton import Letters
    from linocut.kernels.peer_norm_triton import triton_peer_add_rms_norm
    from linocut.kernels.projection_triton import triton_projection

    addresses = torch.tensor([memory.data_ptr() for memory in memories])
    turns = torch.full((ROWS,), FIRST, dtype=torch.int32)
    letters = Letters(addresses, turns, rank, len(memories), ROWS, WORDS)
    late = random.Random(rank)
    found = []
    for turn in range(TURNS):
        if late.random() < 0.2:
            time.sleep(0.02 * late.random())
        factors, residual, weight = _case(turn, len(memories), *kinds[turn % len(kinds)])
        sent = _is_sent(turn, rank, residual)
        part = triton_projection(*factors[rank], letters=letters) if sent else linear(*factors[rank])
        assert letters.take(part)
        out, total = triton_peer_add_rms_norm(part, residual, weight, 1e-6, turn % 2 == 0, letters, sent)
        found.append((out.tolist(), total.tolist()))
    answers.put((rank, found))


Factors = tuple[Tensor, Tensor, Tensor | None]


def _case(turn: int, ranks: int, dtype: torch.dtype, size: int) -> tuple[list[Factors], Tensor, Tensor]:
    """The factors of every rank's part, of which the first has a bias, a residual and a norm's weight. Between one row
    and all that fit, so that rows come to different turns; some products are long, of tiles that programs share."""
    draw, rows, inner = torch.Generator().manual_seed(turn), 1 + turn % ROWS, 3328 if turn % 7 == 1 else 128
    factors: list[Factors] = []
    for rank in range(ranks):
        x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((rows, inner), (size, inner), (size,)))
        factors.append((x.to(dtype), (weight / inner**0.5).to(dtype), None if rank else bias.to(dtype)))
    residual, weight = torch.randn(rows, size, generator=draw), torch.randn(size, generator=draw)
    return factors, residual.to(dtype), weight.to(dtype)


def _is_sent(turn: int, rank: int, like: Tensor) -> bool:
    """By the product; what one rank does is nothing to the others."""
    return (turn + rank) % 3 > 0 and like.dtype.itemsize == 2


@pytest.mark.parametrize(
    ("ranks", "kinds", "tolerance"),
    [
        (2, [(torch.float32, 96)], 1e-6),
        (3, [(torch.float32, 128), (torch.float16, 62), (torch.float32, 1)], 2e-3),
        (2, [(torch.bfloat16, 256)], 4e-2),  # the interpreter rounds towards zero
    ],
)
def test_all_ranks_get_the_norm_of_the_sum(ranks: int, kinds: list[tuple[torch.dtype, int]], tolerance: float):
    context = mp.get_context("spawn")
    memories = [torch.zeros(2, ranks, ROWS, WORDS, dtype=torch.int64).share_memory_() for _ in range(ranks)]
    answers = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, memories, kinds, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=200) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert all(found[rank] == found[0] for rank in range(ranks)), "ranks have other bits"
    last = [(FIRST + turn + 2**31) % 2**32 - 2**31 for turn in (TURNS - 1, TURNS)]
    for rank, memory in enumerate(memories):
        for other in set(range(ranks)) - {rank}:
            turns = (memory[:, other, 0, 0] >> 32).tolist()
            assert sorted(turns) == last, "a turn is not where the one before may still be read"
    for turn in range(TURNS):
        dtype, size = kinds[turn % len(kinds)]
        factors, residual, weight = _case(turn, ranks, dtype, size)
        whole = sum(linear(*own).float() for own in factors)
        out, total = add_rms_norm(whole.to(dtype), residual, weight, 1e-6, turn % 2 == 0)
        for ours, expected in zip(found[0][turn], (out, total), strict=True):
            torch.testing.assert_close(torch.tensor(ours), expected.float(), rtol=tolerance, atol=tolerance)


def test_rows_that_do_not_fit_are_not_taken():
    from linocut.kernels.letters_triton import Letters

    letters = Letters(torch.zeros(2), torch.zeros(4), 0, 2, 4, 16)
    assert letters.take(torch.zeros(4, 16))
    assert letters.take(torch.zeros(1, 32, dtype=torch.float16))
    for refused in (torch.zeros(5, 16), torch.zeros(0, 16), torch.zeros(1, 17), torch.zeros(1, 8, dtype=torch.float64)):
        assert not letters.take(refused)
    assert not letters.take(torch.zeros(1, 31, dtype=torch.bfloat16)), "half a word"
    two, eight = (Letters(torch.zeros(n), torch.zeros(64), 0, n, 64, 8192) for n in (2, 8))
    many = torch.zeros(64, 3584, dtype=torch.bfloat16)
    assert two.take(many)
    assert not eight.take(many), "too much to send to seven others"
