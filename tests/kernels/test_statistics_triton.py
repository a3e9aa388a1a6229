"""Triton noise, filters and vocabulary statistics against torch and float64."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from linocut.kernels import statistics_triton
from linocut.kernels.filters import filter_cutoff
from linocut.kernels.philox import gumbel_noise, noise_words
from linocut.kernels.philox_triton import noise_words as triton_words
from linocut.kernels.ragged import sampling_case
from linocut.kernels.statistics import concat_partials, merge_partials, partial_statistics, vocab_statistics
from linocut.kernels.statistics_oracle import statistics_oracle

ALL = {"entropy": True, "margin": True, "top_k": 4}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(statistics_triton, "_BLOCK", 128)


def assert_same(found, expected, tolerance=3e-5):
    for field in fields(expected):
        wanted, value = getattr(expected, field.name), getattr(found, field.name)
        if wanted.dtype == torch.int64:
            assert torch.equal(value, wanted), field.name
        else:
            torch.testing.assert_close(value.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def keys(rows):
    seed = torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(rows))
    return seed, torch.arange(rows).int(), torch.arange(rows) * 77, torch.full((rows,), 2**31 - 1, dtype=torch.int32)


@triton.jit
def _words_kernel(seed, choice, position, step, out, first_quad, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    quad = first_quad + tl.arange(0, BLOCK // 4)
    words = triton_words(tl.load(seed + row), tl.load(choice + row), tl.load(position + row), tl.load(step + row), quad)
    tl.store(out + row * BLOCK + tl.arange(0, BLOCK), words.to(tl.int64))


@pytest.mark.parametrize("first", [0, 38_000])
def test_words_are_bitwise_those_of_torch(first):
    rows, width = 5, 64
    parts = keys(rows)
    out = torch.zeros(rows, width, dtype=torch.int64)
    _words_kernel[(rows,)](*parts, out, first, BLOCK=width)
    quads = torch.arange(first, first + width // 4)[None]
    assert torch.equal(out, noise_words(*(part[:, None] for part in parts), quads).flatten(1))


@pytest.mark.parametrize(("start", "width"), [(0, 1500), (1, 30), (4098, 259), (152_000, 64)])
def test_noise_is_that_of_torch(start, width):
    parts = keys(3)
    found = gumbel_noise(*parts, start, width, backend="triton")
    torch.testing.assert_close(found, gumbel_noise(*parts, start, width), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cutoffs_keep_what_torch_keeps(dtype):
    logits, sampling = sampling_case(5, rows=14, vocab=150, dtype=dtype)
    logits[::2] -= 20  # cuts below zero, whose keys are flipped
    expected = filter_cutoff(logits, sampling).kept(logits, 0)
    found = filter_cutoff(logits, sampling, backend="triton").kept(logits, 0)
    possible = logits > -torch.inf
    assert torch.equal(found & possible, expected & possible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [33, 500])
def test_greedy_rows_match_the_definition(dtype, vocab):
    logits, _ = sampling_case(0, rows=9, vocab=vocab, dtype=dtype)
    found = vocab_statistics(logits, None, backend="triton", **ALL)
    assert_same(found, statistics_oracle(logits, None, top_k=4))


def test_two_equal_best_logits_have_no_margin():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-5.0, -2.0, -4.0, -torch.inf]])
    found = vocab_statistics(logits, None, margin=True, backend="triton")
    assert found.token.tolist() == [1, 1]
    assert found.margin.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("filtered", [False, True])
def test_sampled_and_filtered_rows_match_the_definition(filtered):
    for seed in range(2):
        logits, sampling = sampling_case(seed, rows=8, vocab=310, filtered=filtered)
        asked = torch.arange(8) % 3 == 0
        found = vocab_statistics(logits, sampling, filtered_confidence=asked, backend="triton", **ALL)
        assert_same(found, statistics_oracle(logits, sampling, top_k=4, filtered_confidence=asked))


def test_filters_without_sampling():
    logits, sampling = sampling_case(4, rows=6, vocab=310, sampled=False)
    asked = torch.ones(6, dtype=torch.bool)
    found = vocab_statistics(logits, sampling, filtered_confidence=asked, backend="triton", **ALL)
    assert_same(found, statistics_oracle(logits, sampling, top_k=4, filtered_confidence=asked))


def test_slices_at_odd_ids_merge_to_the_whole():
    logits, sampling = sampling_case(7, rows=6, vocab=311)
    cutoff = filter_cutoff(logits, sampling)
    asked = torch.ones(6, dtype=torch.bool)
    parts = [
        partial_statistics(
            logits[:, start:end], start, sampling, cutoff=cutoff, kept_total=True, backend="triton", **ALL
        )
        for start, end in [(0, 101), (101, 182), (182, 311)]
    ]
    merged = merge_partials(concat_partials(parts), sampling, filtered_confidence=asked)
    assert_same(merged, statistics_oracle(logits, sampling, top_k=4, filtered_confidence=asked))


def test_a_row_whose_every_id_is_banned_gives_no_nan():
    logits, sampling = sampling_case(8, rows=2, vocab=140)
    logits.fill_(-torch.inf)
    for settings in (None, sampling):
        found = vocab_statistics(logits, settings, entropy=True, backend="triton")
        assert torch.equal(found.confidence, torch.zeros(2))
        assert ((found.token >= 0) & (found.token < 140)).all()


def test_no_rows():
    logits, _ = sampling_case(9, rows=0, vocab=50)
    assert vocab_statistics(logits, None, backend="triton").token.shape == (0,)
