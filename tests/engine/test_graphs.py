"""What surrounds the replay of a CUDA graph: sizes, and the buffers that a replay reads."""

import pytest
import torch

from linocut.engine.batch import ForwardBatch
from linocut.engine.graphs import MAX_GRAPHS, MAX_TOKENS, _fill, _static_batch, bucket_of
from linocut.kernels.attention import AttentionLayout


def batch(rows: int, width: int, pages: int, page_size: int = 8) -> ForwardBatch:
    tokens = rows * width
    layout = AttentionLayout(
        query_start=torch.arange(rows + 1, dtype=torch.int32) * width,
        page_table=torch.arange(rows * pages, dtype=torch.int32).view(rows, pages) + 1,
        visible=torch.full((tokens,), pages * page_size, dtype=torch.int32),
        scratch_start=None,
        scratch_end=None,
        max_query=width,
        max_visible=pages * page_size,
        page_size=page_size,
    )
    counted = torch.arange(tokens, dtype=torch.int32) + 1
    return ForwardBatch(counted, counted + 100, counted + 200, layout, None, None)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 33, 100, 257, 1000, MAX_TOKENS])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_bucket_holds_what_it_is_asked_for_and_adds_at_most_half_of_the_tokens(tokens: int, rows: int) -> None:
    bucket = bucket_of(tokens, rows, 33, 700, False)
    assert bucket.tokens >= tokens
    assert bucket.tokens <= max(tokens * 1.5, 4)
    assert bucket.rows >= rows
    assert bucket.query >= 33
    assert bucket.visible >= 700


def test_a_growing_load_needs_few_graphs() -> None:
    """Rows of one block, alone and with the commit of the block before, up to 64 of them over growing contexts."""
    seen = {
        bucket_of(min(rows * 4 + extra * 4, MAX_TOKENS), rows, 8, context, False)
        for rows in range(1, 65)
        for extra in (0, rows // 3, rows)
        for context in (100, 900, 1800)
    }
    assert len(seen) <= MAX_GRAPHS


def test_a_replay_reads_the_batch_and_nothing_of_the_one_before() -> None:
    large, small = batch(rows=4, width=4, pages=3), batch(rows=2, width=3, pages=2)
    static = _static_batch(bucket_of(16, 4, 4, 24, False), 8, torch.device("cpu"))
    _fill(static, large)
    _fill(static, small)
    for name in ("ids", "positions", "slots"):
        assert torch.equal(getattr(static, name)[:6], getattr(small, name))
    assert (static.slots[6:] == 0).all(), "padding tokens write to the padding page"
    assert (static.layout.visible[6:] == 0).all(), "padding tokens see nothing"
    assert static.layout.query_start[:3].tolist() == [0, 3, 6]
    assert (static.layout.query_start[3:] == 6).all(), "padding rows own no queries"
    assert torch.equal(static.layout.page_table[:2, :2], small.layout.page_table)


def test_what_a_forward_does_not_use_of_adapters_and_segments_is_off() -> None:
    """A batch with draft segments, then a smaller one with fewer, then one without."""

    def noisy_batch(rows: int, scratch: bool) -> ForwardBatch:
        made = batch(rows=rows, width=4, pages=3)
        made.noisy = torch.ones(rows * 4, dtype=torch.bool)
        if scratch:
            made.layout.scratch_start = torch.full((rows * 4,), 20, dtype=torch.int32)
            made.layout.scratch_end = torch.full((rows * 4,), 24, dtype=torch.int32)
        return made

    static = _static_batch(bucket_of(16, 4, 4, 24, True), 8, torch.device("cpu"))
    layout = static.layout
    assert static.noisy is not None
    assert layout.scratch_start is not None
    assert layout.scratch_end is not None
    _fill(static, noisy_batch(4, True))
    assert static.noisy.all()
    assert (layout.scratch_end == 24).all()
    _fill(static, noisy_batch(2, True))
    assert static.noisy.tolist() == [True] * 8 + [False] * 8
    assert (layout.scratch_start.tolist(), layout.scratch_end.tolist()) == ([20] * 8 + [0] * 8, [24] * 8 + [0] * 8)
    _fill(static, noisy_batch(2, False))
    assert not layout.scratch_start.any()
    assert not layout.scratch_end.any()
