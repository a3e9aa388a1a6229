"""Random ragged inputs for attention and statistics, for tests and for `kernels.check`."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import AttentionLayout
from .statistics import SamplingRows


def ragged_case(
    seed: int,
    *,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 16,
    page_size: int = 16,
    widths: list[int] | None = None,
    contexts: list[int] | None = None,
    scratch: bool = False,
    padding: int = 0,
    padding_rows: int = 0,
    shuffled: bool = True,
    known_lengths: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, AttentionLayout]:
    """(q, k_cache, v_cache, layout): rows of `widths` queries that see at most `contexts` slots.

    a(q) is a row's context for about a third of its queries and random below it for the others. `padding` tokens after
    the last row and `padding_rows` of no queries see nothing. Page 0 is nobody's.
    """
    random = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    widths = [integer(1, 9) for _ in range(integer(1, 6))] if widths is None else widths
    contexts = [integer(1, 70) for _ in widths] if contexts is None else contexts
    visible: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for width, context in zip(widths, contexts, strict=True):
        for _ in range(width):
            visible.append(integer(0, context) if integer(0, 2) else context)
            start = integer(visible[-1], context)
            starts.append(start)
            ends.append(integer(start, context) if integer(0, 1) else start)
    tokens = sum(widths) + padding
    visible += [0] * padding
    starts += [0] * padding
    ends += [0] * padding
    needs = [-(-context // page_size) for context in contexts]
    pages = sum(needs) + 2
    ids = torch.randperm(pages - 1, generator=random) + 1 if shuffled else torch.arange(1, pages)
    table = torch.zeros(len(widths) + padding_rows, max(needs) + 1, dtype=torch.int32)
    for row, need in enumerate(needs):
        table[row, :need] = ids[sum(needs[:row]) : sum(needs[:row]) + need]
    cumulated = torch.tensor([0, *widths, *([0] * padding_rows)]).cumsum(0).int()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    layout = AttentionLayout(
        query_start=cumulated.to(device),
        page_table=table.to(device),
        visible=torch.tensor(visible, dtype=torch.int32, device=device),
        scratch_start=torch.tensor(starts, dtype=torch.int32, device=device) if scratch else None,
        scratch_end=torch.tensor(ends, dtype=torch.int32, device=device) if scratch else None,
        max_query=max(widths),
        max_visible=max(contexts),
        query_lengths=[*widths, *([0] * padding_rows)] if known_lengths else None,
        page_size=page_size,
    )
    q = normal(tokens, kv_heads * group, head_dim)
    cache = (pages, page_size, kv_heads, head_dim)
    return q, normal(*cache), normal(*cache), layout


def sampling_case(
    seed: int,
    *,
    rows: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    filtered: bool = True,
    sampled: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, SamplingRows]:
    """(logits [rows, vocab], settings): coarse logits, so that many tie, a tenth banned; every mix of settings."""
    random = torch.Generator().manual_seed(seed)

    def one_of(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (rows,), generator=random)].to(device)

    def below(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (rows,), generator=random).to(device)

    logits = (torch.randn(rows, vocab, generator=random) * 2).round(decimals=1)
    banned = torch.rand(rows, vocab, generator=random) < 0.1
    banned[:, 0] = False
    logits.masked_fill_(banned, -torch.inf)
    off = torch.zeros(rows, device=device)
    sampling = SamplingRows(
        temperature=one_of(0.0, 0.5, 1.0, 1.7) if sampled else off,
        top_k=(one_of(0, 0, 1, 5, vocab + 3) if filtered else off).int(),
        top_p=one_of(1.0, 1.0, 0.95, 0.5, 0.01) if filtered else off + 1,
        min_p=one_of(0.0, 0.0, 0.05, 0.4) if filtered else off,
        seed=below(-(2**62), 2**62),
        choice=one_of(0, 1, 2).int(),
        position=below(0, 4096).int(),
        step=one_of(0, 1, 7).int(),
        filtered=filtered,
        sampled=sampled,
    )
    return logits.to(device, dtype), sampling
