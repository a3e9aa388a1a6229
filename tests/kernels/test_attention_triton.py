"""The Triton attention kernel against the definition in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels.attention import AttentionLayout, plan_attention, staircase_attention
from linocut.kernels.attention_cuts import Config, choose_config
from linocut.kernels.attention_oracle import staircase_attention_oracle
from linocut.kernels.attention_triton import _tile_map, triton_attention
from linocut.kernels.ragged import ragged_case

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(case, config=None):
    q, k_cache, v_cache, layout = case
    scale = q.shape[-1] ** -0.5
    expected = staircase_attention_oracle(q, k_cache, v_cache, layout, scale)
    # Nobody may read what no query sees: it holds no numbers here.
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[0], v_cache[0] = torch.nan, torch.nan
    out = triton_attention(q, k_cache, v_cache, layout, scale, config)
    assert out.dtype == q.dtype
    assert (out.double() - expected).abs().max() <= TOLERANCE[q.dtype]


@pytest.mark.parametrize("group", [1, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("scratch", [False, True])
def test_ragged_rows_match_the_definition(group, scratch):
    shape = {"group": group, "page_size": 32 if group % 2 else 16, "padding": group % 4, "padding_rows": group % 3}
    check(ragged_case(group, scratch=scratch, **shape))


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("block_m", [16, 32])
def test_splits_and_tiles_do_not_change_the_result(splits, block_m):
    case = ragged_case(
        20, widths=[11, 1, 5], contexts=[150, 70, 33], group=3, scratch=splits == 2, kv_heads=1, padding=3
    )
    check(case, Config(block_m, 16, splits, 4, 2))


@pytest.mark.parametrize("first", [31, 32, 33])
def test_reaches_around_the_edge_of_a_step(first):
    q, k_cache, v_cache, layout = ragged_case(27, widths=[4], contexts=[40], kv_heads=1)
    layout.visible[:] = torch.tensor([first, 32, 33, 40])
    check((q, k_cache, v_cache, layout), Config(16, 16, 1, 4, 2))


@pytest.mark.parametrize("page_size", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_page_sizes_and_head_dimensions(page_size, head_dim):
    case = ragged_case(21, widths=[4, 2], contexts=[90, 65], page_size=page_size, head_dim=head_dim, kv_heads=1)
    check(case, Config(16, 32, 1, 4, 2))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_dtype(dtype):
    check(ragged_case(22, widths=[3, 6], contexts=[40, 21], dtype=dtype))


def test_rows_that_see_nothing_and_padding_are_zero():
    q, k_cache, v_cache, layout = ragged_case(23, widths=[2, 3], contexts=[20, 40], padding=5, padding_rows=2)
    layout.visible[:3] = 0
    out = staircase_attention(q, k_cache, v_cache, layout, 0.25, backend="triton")
    assert not out[:3].any()
    assert not out[5:].any()
    assert out[3:5].all()


def test_padding_tokens_see_nothing_whatever_their_entry_says():
    q, k_cache, v_cache, layout = ragged_case(24, widths=[2], contexts=[20], padding=2)
    layout.visible[2:] = 10_000
    assert not staircase_attention(q, k_cache, v_cache, layout, 0.25, backend="triton")[2:].any()


def test_strided_queries():
    q, k_cache, v_cache, layout = ragged_case(25, widths=[4, 1], contexts=[20, 9])
    wide = torch.cat([q, q, q], dim=1)[:, q.shape[1] : 2 * q.shape[1]]
    first = staircase_attention(q, k_cache, v_cache, layout, 0.25, backend="triton")
    assert torch.equal(staircase_attention(wide, k_cache, v_cache, layout, 0.25, backend="triton"), first)


def test_tiles_cover_every_query_once():
    widths = [5, 0, 1, 17, 0, 0, 4]
    for tail in ([], [0, 0]):
        start = torch.tensor([0, *widths, *tail]).cumsum(0).int()
        tokens = sum(widths) + 6
        rows = len(widths) + len(tail)
        visible = torch.zeros(tokens, dtype=torch.int32)
        for positions in (1, 2, 4, 5, 32):
            layout = AttentionLayout(start, torch.zeros(rows, 1).int(), visible, None, None, 17, 1)
            covered = []
            for row, first, count in _tile_map(layout, positions, tokens).tolist():
                assert 0 <= count <= positions
                covered += [(row, first + query) for query in range(count)]
            queries = range(tokens)
            owner = torch.searchsorted(start[1:].contiguous(), torch.tensor(queries), right=True).tolist()
            assert sorted(covered) == sorted(zip(owner, queries, strict=True))


def test_configurations_fit_the_shapes():
    decode = choose_config(1, 1, 1, 8192, 4, 7, 128, 132)
    assert decode.block_m == 16
    assert decode.splits >= 16
    denoise = choose_config(64 * 32, 64, 32, 1024, 4, 7, 128, 132)
    assert denoise.block_m == 128
    assert denoise.splits == 1
    for rows, width, group, visible, itemsize in product(
        (1, 8, 300), (1, 4, 32, 512), (1, 3, 7, 8, 16), (1, 64, 96, 128, 640, 1280, 4096, 10_240), (2, 4)
    ):
        config = choose_config(rows * width, rows, width, visible, 4, group, 128, 132, itemsize)
        assert config.block_m >= group
        assert config.block_m in (16, 32, 64, 128)
        # Fewer than half of the programs that share a tile's keys may find none.
        assert config.splits == 1 or config.splits // 2 * config.block_n < visible


def test_a_layout_may_be_planned_before():
    q, k_cache, v_cache, layout = ragged_case(3)
    plan_attention(layout, q.shape[0], q.shape[1], k_cache, backend="triton")
    made = dict(layout.plans)
    found = staircase_attention(q, k_cache, v_cache, layout, 0.25, backend="triton")
    assert made
    assert layout.plans == made, "the plan was that of the call"
    torch.testing.assert_close(found, staircase_attention(q, k_cache, v_cache, layout, 0.25), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("takes", [False, True])
def test_nothing_is_planned_for_a_forward_that_flash_attention_takes(takes):
    class Flash:
        def takes(self, layout, tokens, k_cache):
            return takes

    q, k_cache, _, layout = ragged_case(4)
    plan_attention(layout, q.shape[0], q.shape[1], k_cache, backend="triton", flash=Flash())
    assert bool(layout.plans) is not takes


def test_odd_head_dimensions_are_refused():
    q, k_cache, v_cache, layout = ragged_case(26, head_dim=24)
    with pytest.raises(ValueError, match="powers of two"):
        staircase_attention(q, k_cache, v_cache, layout, 0.25, backend="triton")
