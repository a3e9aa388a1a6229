"""Products of few rows in Triton against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels.letters_triton import Letters
from linocut.kernels.projection import MOST_ROWS, TILE, LowRank, is_faster, is_worth_sending, project, sharers
from linocut.kernels.projection_triton import scratch, triton_projection


def case(rows, features, inner, dtype=torch.float32, bias=False):
    x, weight = torch.randn(rows, inner), torch.randn(features, inner) / inner**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(features).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("features", "inner"), [(64, 256), (200, 128), (40, 384)])
def test_the_product_is_that_of_torch(dtype, rows, bias, features, inner):
    x, weight, added = case(rows, features, inner, dtype, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    found = project(x, weight, added, backend="triton")
    assert found.dtype == dtype
    torch.testing.assert_close(found, project(x, weight, added), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("features", [128, 64, 200, 40])
def test_gates_are_applied_to_values(dtype, rows, bias, features):
    x, weight, added = case(rows, features, 256, dtype, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    found = project(x, weight, added, activate=True, backend="triton")
    expected = project(x, weight, added, activate=True)
    assert found.shape == expected.shape == (rows, features // 2)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize(("features", "rank", "bias"), [(128, 64, False), (200, 128, True), (40, 64, True)])
def test_an_update_comes_in_the_same_launch(dtype, activate, features, rank, bias):
    _, weight, added = case(1, features + rank, 256, dtype, bias)
    if added is not None:
        added[features:] = 0
    low_rank = LowRank((torch.randn(features, rank) / rank**0.5).to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    # One launch after another, of other sizes: what programs tell each other is of the present one.
    for rows in (1, 20, MOST_ROWS, 3, 20):
        x, gated = torch.randn(rows, 256).to(dtype), torch.rand(rows) < 0.6
        given = {"low_rank": low_rank, "gated": gated, "activate": activate}
        found = project(x, weight, added, backend="triton", **given)
        expected = project(x, weight, added, **given)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        plain = project(x, weight[:features], added if added is None else added[:features], activate=activate)
        assert not torch.allclose(found[gated], plain[gated], atol=0.05) or not gated.any()
        torch.testing.assert_close(found[~gated], plain[~gated], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize(("features", "inner"), [(320, 8192 + 256), (200, 8192 + 256), (320, 3072 + 256), (200, 3072)])
def test_programs_share_the_tiles_of_a_product_of_few(rank, features, inner):
    assert sharers(-(-features // TILE), inner, 132) == (2 if inner > 8192 else 3)
    low_rank, gated = LowRank(torch.randn(features, rank).half() / 8) if rank else None, torch.arange(9) % 2 > 0
    for rows in (9, 3):
        x, weight, _ = case(rows, features + rank, inner, torch.float16)
        given = {"low_rank": low_rank, "gated": gated[:rows]} if rank else {}
        found = project(x, weight, backend="triton", **given)
        torch.testing.assert_close(found, project(x, weight, **given), rtol=8e-3, atol=8e-3)
    assert not scratch(x.device)[1].any(), "counters are as they were"
    alone = project(x[:1], weight, backend="triton", **{**given, "gated": gated[:1]} if rank else {})
    assert torch.equal(alone, found[:1])


def test_turns_of_launches_may_wrap():
    low_rank = LowRank(torch.randn(64, 64))
    x, weight = torch.randn(2, 128), torch.randn(128, 128)
    gated = torch.tensor([True, False])
    low_rank.turns.fill_(2**31 - 2)
    for _ in range(4):
        found = project(x, weight, low_rank=low_rank, gated=gated, backend="triton")
        torch.testing.assert_close(found, project(x, weight, low_rank=low_rank, gated=gated), rtol=1e-4, atol=1e-4)
    assert low_rank.turns.tolist() == [-(2**31) + 2] * 2
    assert (low_rank.hidden[0] >> 32 == -(2**31) + 2).all()


@pytest.mark.parametrize("rank", [0, 8, 96, 192, 256, 512])
def test_a_rank_that_is_not_for_it_is_refused(rank):
    assert not LowRank.fits(rank)
    with pytest.raises(ValueError, match=f"not {rank}"):
        LowRank(torch.zeros(64, rank))


def test_more_rows_than_an_update_has_room_for_are_refused():
    low_rank, rows = LowRank(torch.zeros(64, 64)), MOST_ROWS + 1
    x, gated = torch.zeros(rows, 128), torch.ones(rows, dtype=torch.bool)
    for weight, asked in ((torch.zeros(128, 128), rows), (torch.zeros(192, 128), 3)):
        with pytest.raises(ValueError, match=f"64 features for {MOST_ROWS} rows"):
            project(x[:asked], weight, low_rank=low_rank, gated=gated[:asked], backend="triton")
    with pytest.raises(ValueError, match="no gates"):
        project(x, torch.zeros(65, 128), activate=True, backend="triton")


def test_rows_may_be_strided_and_there_may_be_none():
    x, weight, _ = case(6, 64, 128)
    wide = torch.cat([x, x], dim=1)[:, :128]
    torch.testing.assert_close(project(wide, weight, backend="triton"), project(x, weight))
    assert project(x[:0], weight, backend="triton").shape == (0, 64)


def test_a_row_has_the_same_bits_beside_other_rows():
    x, weight, _ = case(30, 96, 256)
    together = project(x, weight, backend="triton")
    for rows in (17, 24):  # which fill up to as many
        assert torch.equal(project(x[:rows], weight, backend="triton"), together[:rows])


def test_an_inner_size_that_it_cannot_step_through_is_refused():
    x, weight, _ = case(2, 64, 96)
    with pytest.raises(ValueError, match="multiples of 128"):
        project(x, weight, backend="triton")


def test_it_serves_where_it_measured_faster_and_nowhere_else():
    def faster(rows, features, inner, dtype=torch.bfloat16):
        return is_faster(rows, torch.empty(features, inner, dtype=dtype, device="meta"), 132)

    assert faster(32, 2 * 18_944, 3584)
    assert faster(8, 152_064, 3584)
    assert faster(32, 3584, 3584)
    assert not faster(33, 2 * 18_944, 3584), "more rows"
    assert faster(8, 4608, 3584), "queries, keys and values"
    assert faster(1, 18_944, 3584), "half of gate and up, on one of two GPUs"
    assert faster(1, 3584, 9472), "half of down"
    assert faster(32, 3584, 18_944), "down, which two programs share"
    assert faster(25, 3584 + 128, 18_944), "with an adapter's way down"
    assert faster(8, 4608 + 128, 3584)
    assert not faster(8, 4608, 18_944), "too many tiles to be shared"
    assert not faster(8, 3584, 6144), "too short"
    assert not faster(8, 3584, 1792), "half of the output"
    assert not faster(8, 49_152, 576), "an inner size that is no multiple of its step"
    assert not faster(8, 152_064, 3584, torch.float32)


def test_parts_of_a_sum_are_sent_where_that_costs_no_more():
    def worth(rows, features, inner, dtype=torch.bfloat16):
        return is_worth_sending(rows, torch.empty(features, inner, dtype=dtype, device="meta"), 132)

    assert worth(1, 3584, 1792), "half of the output, for which cuBLAS is as fast"
    assert worth(32, 3584, 9472), "half of down"
    assert not worth(33, 3584, 1792)
    assert not worth(1, 3584, 6144), "too short to be shared, too long for one program"
    assert not worth(1, 1536, 4096), "too few tiles"
    assert not worth(1, 12_288, 4096), "more tiles than processors"
    assert not worth(1, 3584, 1792 + 128), "an odd number of steps"
    assert not worth(1, 3584 + 32, 1792), "half a tile"
    assert not worth(1, 3584, 1792, torch.float32)
    assert not worth(0, 3584, 1792)


def test_what_letters_cannot_carry_is_refused():
    letters = Letters(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), 0, 2, 2, 32)
    for rows, features, dtype, activate in (
        (3, 64, torch.float16, False),
        (1, 66, torch.float16, False),
        (1, 63, torch.float16, False),
        (1, 32, torch.float32, False),
        (1, 64, torch.float16, True),
    ):
        x, weight, _ = case(rows, features, 128, dtype)
        with pytest.raises(ValueError, match=f"{rows} rows of {features} features"):
            triton_projection(x, weight, None, activate=activate, letters=letters)
