"""The sum over ranks with its norm: ranks are processes here, and their memory is shared."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from linocut.kernels.norm import add_rms_norm

pytest.importorskip("triton", reason="triton is not installed")

TURNS, ROWS, WORDS = 5, 3, 128


def _rank(rank: int, memories: list[torch.Tensor], dtype: torch.dtype, size: int, answers: mp.Queue) -> None:
    from linocut.kernels.interpreter import use_interpreter

    use_interpreter()
    from linocut.kernels.peer_norm_triton import Letters, triton_peer_add_rms_norm

    addresses = torch.tensor([memory.data_ptr() for memory in memories])
    letters = Letters(addresses, torch.zeros(ROWS, dtype=torch.int32), rank, len(memories), ROWS, WORDS)
    found = []
    for turn in range(TURNS):
        parts, residual, weight = _case(turn, len(memories), dtype, size)
        assert letters.take(parts[rank])
        out, total = triton_peer_add_rms_norm(parts[rank], residual, weight, 1e-6, turn % 2 == 0, letters)
        found.append((out.tolist(), total.tolist()))
    answers.put((rank, found))


def _case(turn: int, ranks: int, dtype: torch.dtype, size: int):
    """Between one row and all that fit, so that rows come to different turns."""
    draw, rows = torch.Generator().manual_seed(turn), 1 + turn % ROWS
    parts = [torch.randn(rows, size, generator=draw).to(dtype) for _ in range(ranks)]
    residual, weight = torch.randn(rows, size, generator=draw), torch.randn(size, generator=draw)
    return parts, residual.to(dtype), weight.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "ranks", "size", "tolerance"),
    [
        (torch.float32, 2, 96, 1e-6),
        (torch.float32, 3, 128, 1e-6),
        (torch.float16, 3, 62, 2e-3),
        (torch.bfloat16, 2, 256, 4e-2),  # the interpreter rounds towards zero
    ],
)
def test_all_ranks_get_the_norm_of_the_sum(dtype: torch.dtype, ranks: int, size: int, tolerance: float):
    context = mp.get_context("spawn")
    memories = [torch.zeros(2, ranks, ROWS, WORDS, dtype=torch.int64).share_memory_() for _ in range(ranks)]
    answers = context.Queue()
    processes = [context.Process(target=_rank, args=(r, memories, dtype, size, answers)) for r in range(ranks)]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=100) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert all(found[rank] == found[0] for rank in range(ranks)), "ranks have other bits"
    for turn in range(TURNS):
        parts, residual, weight = _case(turn, ranks, dtype, size)
        whole = sum(part.float() for part in parts[1:]) + parts[0].float()
        out, total = add_rms_norm(whole.to(dtype), residual, weight, 1e-6, turn % 2 == 0)
        for ours, expected in zip(found[0][turn], (out, total), strict=True):
            torch.testing.assert_close(torch.tensor(ours), expected.float(), rtol=tolerance, atol=tolerance)


def test_rows_that_do_not_fit_are_not_taken():
    from linocut.kernels.peer_norm_triton import Letters

    letters = Letters(torch.zeros(2), torch.zeros(4), 0, 2, 4, 16)
    assert letters.take(torch.zeros(4, 16))
    assert letters.take(torch.zeros(1, 32, dtype=torch.float16))
    for refused in (torch.zeros(5, 16), torch.zeros(0, 16), torch.zeros(1, 17), torch.zeros(1, 8, dtype=torch.float64)):
        assert not letters.take(refused)
    assert not letters.take(torch.zeros(1, 31, dtype=torch.bfloat16)), "half a word"
