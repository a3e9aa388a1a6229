"""Staircase attention with torch operators, against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from linocut.kernels.attention import AttentionLayout, staircase_attention
from linocut.kernels.attention_oracle import staircase_attention_oracle
from linocut.kernels.attention_torch import padded_attention
from linocut.kernels.ragged import ragged_case

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def check(q, k_cache, v_cache, layout, paths=(staircase_attention, padded_attention)):
    scale = q.shape[-1] ** -0.5
    expected = staircase_attention_oracle(q, k_cache, v_cache, layout, scale)
    for path in paths:
        out = path(q, k_cache, v_cache, layout, scale)
        assert out.dtype == q.dtype
        assert out.shape == q.shape
        assert (out.double() - expected).abs().max() <= TOLERANCE[q.dtype]
    return expected


@pytest.mark.parametrize("group", [1, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("scratch", [False, True])
def test_ragged_rows_match_the_definition(group, scratch):
    for seed in range(4):
        page_size = 16 if seed % 2 else 32
        check(
            *ragged_case(seed, group=group, scratch=scratch, page_size=page_size, padding=seed, padding_rows=seed % 3)
        )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_dtype(dtype):
    check(*ragged_case(5, dtype=dtype, scratch=True))


def test_rows_of_one_width_and_very_different_lengths_are_grouped_and_put_back_in_order():
    contexts = [3000, 5, 2990, 1, 40, 0, 2000]
    case = ragged_case(6, widths=[4] * 7, contexts=contexts, kv_heads=1)
    check(*case)
    layout = case[3]
    assert 1 < len(layout.plans["torch"].groups) < 7
    assert layout.plans["torch"].order is not None


def test_one_row_that_sees_everything_needs_neither_mask_nor_gather():
    q, k_cache, v_cache, layout = ragged_case(7, widths=[8], contexts=[48], shuffled=False)
    layout.visible.fill_(48)
    check(q, k_cache, v_cache, layout)
    (group,) = layout.plans["torch"].groups
    assert group.hidden is None
    assert isinstance(group.pages, slice)


def test_long_causal_prefill_is_cut_into_tiles_with_their_own_reach():
    width, context = 300, 340
    q, k_cache, v_cache, layout = ragged_case(8, widths=[width, 1], contexts=[context, 9], kv_heads=1, group=2)
    layout.visible[:width] = torch.arange(context - width + 1, context + 1)
    check(q, k_cache, v_cache, layout)
    assert sorted(group.keys for group in layout.plans["torch"].groups)[-3:] == [168, 296, 340]


def test_lengths_are_derived_when_the_host_does_not_give_them():
    check(*ragged_case(9, known_lengths=False, padding=3, padding_rows=2))


def test_a_layout_serves_layers_of_different_caches():
    q, k_cache, v_cache, layout = ragged_case(10)
    first = staircase_attention(q, k_cache, v_cache, layout, 0.25)
    kept = first.clone()
    check(q, k_cache.flip(0).contiguous(), v_cache.flip(0).contiguous(), layout, (staircase_attention,))
    assert torch.equal(first, kept), "a result must not live in a buffer that the next layer overwrites"


def test_padding_is_zero_and_hidden_slots_do_not_matter():
    q, k_cache, v_cache, layout = ragged_case(11, widths=[3, 2, 5], contexts=[20, 33, 7], padding=4)
    layout.visible[3:5] = 0
    before = staircase_attention(q, k_cache, v_cache, layout, 0.25)
    assert torch.equal(before[3:5], torch.zeros_like(before[3:5]))
    assert torch.equal(before[10:], torch.zeros_like(before[10:]))
    assert torch.isfinite(before).all()
    for row, reach in enumerate([int(layout.visible[:3].max()), 0, int(layout.visible[5:10].max())]):
        for slot in range(reach, layout.page_table.shape[1] * 16):
            page = layout.page_table[row, slot // 16]
            if page > 0:
                k_cache[page, slot % 16] = 1e4
                v_cache[page, slot % 16] = -1e4
    k_cache[0], v_cache[0] = 1e4, 1e4
    torch.testing.assert_close(staircase_attention(q, k_cache, v_cache, layout, 0.25), before)


def test_no_tokens_and_no_rows():
    empty = torch.zeros(0, dtype=torch.int32)
    layout = AttentionLayout(torch.zeros(1, dtype=torch.int32), torch.zeros(0, 1).int(), empty, None, None, 0, 0, [])
    cache = torch.zeros(2, 16, 1, 16)
    for path in (staircase_attention, padded_attention):
        assert path(torch.zeros(0, 2, 16), cache, cache, layout, 1.0).shape == (0, 2, 16)


def test_impossible_shapes_are_refused():
    q, k_cache, v_cache, layout = ragged_case(12)
    with pytest.raises(ValueError, match="multiple"):
        staircase_attention(q[:, :5], k_cache, v_cache, layout, 1.0)
    layout.page_size = 8
    with pytest.raises(ValueError, match="pages of 8"):
        staircase_attention(q, k_cache, v_cache, layout, 1.0)
    with pytest.raises(ValueError, match="go together"):
        AttentionLayout(layout.query_start, layout.page_table, layout.visible, layout.visible, None, 1, 1)
