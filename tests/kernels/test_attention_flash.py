"""FlashAttention behind staircase attention: an operator with a build's arguments stands for the GPU's."""

from __future__ import annotations

import math

import pytest
import torch

from linocut.kernels.attention import AttentionLayout, staircase_attention
from linocut.kernels.attention_flash import FlashAttention, FlashUnavailableError, find_flash
from linocut.kernels.attention_oracle import staircase_attention_oracle
from linocut.kernels.attention_self_test import TOLERANCE, attention_error

# The arguments that the two builds share, and those that one of them has.
SHARED = """Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor(a!)? out, Tensor? cu_seqlens_q, Tensor? seqused_q,
    Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, float softmax_scale, bool is_causal,
    int window_size_left, int window_size_right, float softcap, int num_splits"""
BUILDS = {"authors_build": ", int attention_chunk", "packaged_build": ", Tensor? s_aux, int cp_world_size, int cp_rank"}


def attend(q, k, v, out, starts, used, seen, table, scale, causal):
    """What the operator promises: masks from the lower right corner of the rows' used queries and keys."""
    group = q.shape[1] // k.shape[2]
    for row in range(table.shape[0]):
        queries, keys = int(used[row]), int(seen[row])
        first = int(starts[row])
        own = slice(first, first + queries)
        slots = torch.arange(keys)
        pages, offsets = table[row, slots // k.shape[1]], slots % k.shape[1]
        key, value = (c[pages, offsets].float().repeat_interleave(group, 1) for c in (k, v))
        scores = torch.einsum("qhd,shd->hqs", q[own].float(), key) * scale
        if causal:
            hidden = slots[None, :] > torch.arange(queries)[:, None] + keys - queries
            scores.masked_fill_(hidden, -math.inf)
        out[own] = torch.einsum("hqs,shd->qhd", scores.softmax(-1), value).to(out.dtype)


def operator(build):
    extra = BUILDS[build]
    library = torch.library.Library(f"test_{build}", "FRAGMENT")
    if not hasattr(getattr(torch.ops, f"test_{build}"), "fwd"):
        library.define(f"fwd({SHARED}{extra}) -> Tensor[]")
        torch.library.impl(f"test_{build}::fwd", "CPU", lib=library)(_implementation)
    KEPT.append(library)
    return getattr(torch.ops, f"test_{build}").fwd.default


KEPT: list[torch.library.Library] = []


def _implementation(q, k, v, k_new, out, starts, used, seen, longest, most, table, scale, causal, left, right, cap, *_):
    assert k_new is None
    assert (left, right, cap) == (-1, -1, 0.0)
    assert longest >= int(starts.diff().max())
    assert most >= int(seen.max())
    attend(q, k, v, out, starts, used, seen, table, scale, causal)
    return []


def layout_of(pattern, visible, widths, table, page_size=16):
    return AttentionLayout(
        query_start=torch.tensor([0, *widths]).cumsum(0).int(),
        page_table=table,
        visible=torch.tensor(visible, dtype=torch.int32),
        scratch_start=None,
        scratch_end=None,
        max_query=max(widths),
        max_visible=max(visible),
        page_size=page_size,
        pattern=pattern,
    )


def case(pattern, dtype=torch.float16):
    """Three rows; the second one's last two queries and two tokens behind the rows see nothing, the third nothing."""
    widths, ends, live = [6, 7, 3], [40, 21, 0], [6, 5, 0]
    visible = []
    for width, end, used in zip(widths, ends, live, strict=True):
        seen = [end - used + 1 + i if pattern == "causal" else end for i in range(used)]
        visible += seen + [0] * (width - used)
    table = torch.tensor([[3, 1, 5], [2, 4, 0], [0, 0, 0]], dtype=torch.int32)
    layout = layout_of(pattern, [*visible, 0, 0], widths, table)
    return torch.randn(18, 6, 16).to(dtype), *torch.randn(2, 6, 16, 2, 16).to(dtype).unbind(), layout


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("pattern", ["causal", "block"])
def test_rows_attend_as_the_staircase_says(build, pattern):
    q, k, v, layout = case(pattern)
    flash = FlashAttention(operator(build), everything=True)
    assert flash.takes(layout, q.shape[0], k)
    found = staircase_attention(q, k, v, layout, 0.25, flash=flash)
    expected = staircase_attention_oracle(q, k, v, layout, 0.25)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-3)
    assert not found[layout.visible == 0].any(), "queries that see nothing get zeros"


def test_forwards_of_another_shape_stay_with_the_other_kernel():
    flash = FlashAttention(operator("authors_build"), everything=True)
    q, k, v, layout = case("block")
    unknown = layout_of("any", layout.visible.tolist(), [6, 7, 3], layout.page_table)
    assert not flash.takes(unknown, q.shape[0], k)
    assert not flash.takes(layout, q.shape[0], k.float()), "half precision alone"
    found = staircase_attention(q, k, v, unknown, 0.25, flash=flash)
    torch.testing.assert_close(found, staircase_attention(q, k, v, unknown, 0.25))


def test_a_layout_with_scratch_has_no_simple_pattern():
    none = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="not causal"):
        AttentionLayout(torch.tensor([0, 2]).int(), none[None], none + 1, none, none, 2, 1, pattern="causal")


def test_the_self_test_tells_right_attention_from_wrong():
    shape = (6, 2, 16, 16, torch.float16, torch.device("cpu"), "torch")
    assert attention_error(*shape) < TOLERANCE[torch.float16]
    flash = FlashAttention(operator("packaged_build"), everything=True)
    assert attention_error(*shape, flash) < TOLERANCE[torch.float16]

    class Forgetful(FlashAttention):
        """Leaves the last page out."""

        def __call__(self, q, k_cache, v_cache, layout, scale):
            layout.visible.sub_(16).clamp_(min=1)
            return super().__call__(q, k_cache, v_cache, layout, scale)

    wrong = Forgetful(operator("packaged_build"), everything=True)
    assert attention_error(*shape, wrong) > TOLERANCE[torch.bfloat16]


def test_there_is_none_on_a_cpu():
    with pytest.raises(FlashUnavailableError, match="Hopper"):
        find_flash(torch.device("cpu"))
