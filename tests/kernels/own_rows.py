"""What every product on the CPU promises: a row's result is its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assert_rows_own(
    multiply: Callable[[Tensor], Tensor], x: Tensor, threads: int, spoilt: dict[tuple[int, ...], float]
) -> None:
    """Bit for bit, wherever a row stands and however many stand beside it, also beside those of `spoilt`.

    x: [rows, in], sixty rows or more. spoilt: (a row of the first nine,) or (row, input) -> what it becomes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([multiply(x[i : i + 1]) for i in range(len(x))])
        for rows in range(1, len(x)):
            assert torch.equal(multiply(x[:rows]), alone[:rows]), f"{rows} rows"
        assert torch.equal(multiply(x[13:54]), alone[13:54])
        beside = x[:9].clone()
        for place, value in spoilt.items():
            beside[place] = value
        kept = [row for row in range(9) if row not in {place[0] for place in spoilt}]
        assert torch.equal(multiply(beside)[kept], alone[kept])
    finally:
        torch.set_num_threads(before)
