"""Vocabulary statistics with torch operators: against float64, in slices, and as a sampler."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from linocut.kernels import statistics_torch
from linocut.kernels.filters import filter_cutoff
from linocut.kernels.ragged import sampling_case
from linocut.kernels.statistics import (
    SamplingRows,
    concat_partials,
    merge_partials,
    partial_statistics,
    reference_statistics,
    vocab_statistics,
)
from linocut.kernels.statistics_oracle import statistics_oracle

ALL = {"entropy": True, "margin": True, "top_k": 5}


def assert_same(found, expected, tolerance=2e-5):
    for field in fields(expected):
        wanted, value = getattr(expected, field.name), getattr(found, field.name)
        if wanted is None or value is None:
            continue
        if wanted.dtype == torch.int64:
            assert torch.equal(value, wanted), field.name
        else:
            torch.testing.assert_close(value.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def rows_of(sampling, index):
    picked = {
        field.name: getattr(sampling, field.name)[index]
        for field in fields(sampling)
        if isinstance(getattr(sampling, field.name), torch.Tensor)
    }
    return replace(sampling, **picked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [33, 1000])
def test_greedy_rows_match_the_definition(dtype, vocab):
    logits, _ = sampling_case(0, rows=17, vocab=vocab, dtype=dtype)
    found = vocab_statistics(logits, None, **ALL)
    assert_same(found, statistics_oracle(logits, None, top_k=5))
    assert found.confidence.dtype == found.entropy.dtype == found.margin.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filtered", [False, True])
def test_sampled_and_filtered_rows_match_the_definition(dtype, filtered):
    for seed in range(5):
        logits, sampling = sampling_case(seed, rows=19, vocab=310, dtype=dtype, filtered=filtered)
        asked = torch.arange(19) % 3 == 0
        found = vocab_statistics(logits, sampling, filtered_confidence=asked, **ALL)
        assert_same(found, statistics_oracle(logits, sampling, top_k=5, filtered_confidence=asked))


def test_fields_that_were_not_asked_for_are_not_computed():
    found = vocab_statistics(torch.randn(2, 9), None)
    assert (found.entropy, found.margin, found.top_ids, found.top_logits) == (None,) * 4


@pytest.mark.parametrize("cuts", [(0, 310), (0, 100, 310), (0, 3, 77, 201, 310)])
def test_partials_of_slices_merge_to_the_whole(cuts):
    logits, sampling = sampling_case(7, rows=23, vocab=310)
    asked = torch.ones(23, dtype=torch.bool)
    whole = vocab_statistics(logits, sampling, filtered_confidence=asked, **{**ALL, "top_k": 3})
    cutoff = filter_cutoff(logits, sampling)
    parts = [
        partial_statistics(
            logits[:, start:end], start, sampling, cutoff=cutoff, entropy=True, margin=True, top_k=3, kept_total=True
        )
        for start, end in pairwise(cuts)
    ]
    merged = merge_partials(concat_partials(parts), sampling, filtered_confidence=asked)
    assert torch.equal(merged.token, whole.token)
    assert torch.equal(merged.top_ids, whole.top_ids)
    assert_same(merged, whole, 1e-5)


def test_noise_computed_for_the_few_or_for_all_chooses_the_same(monkeypatch):
    logits, sampling = sampling_case(8, rows=40, vocab=401)
    logits *= 4
    few = vocab_statistics(logits, sampling)
    monkeypatch.setattr(statistics_torch, "_SPARSE", -1.0)
    assert torch.equal(vocab_statistics(logits, sampling).token, few.token)
    monkeypatch.setattr(statistics_torch, "_SPARSE", 2.0)
    assert torch.equal(vocab_statistics(logits, sampling).token, few.token)


def test_a_row_depends_on_no_neighbour():
    logits, sampling = sampling_case(9, rows=12, vocab=200)
    whole = vocab_statistics(logits, sampling, **ALL)
    order = torch.randperm(12)
    assert torch.equal(vocab_statistics(logits[order], rows_of(sampling, order)).token, whole.token[order])
    for row in range(12):
        alone = vocab_statistics(logits[row : row + 1], rows_of(sampling, slice(row, row + 1)))
        assert int(alone.token) == int(whole.token[row])
        assert float(alone.confidence) == pytest.approx(float(whole.confidence[row]), rel=1e-6)


def many(count, logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """`count` draws from one row of logits: one seed, as many positions."""

    def whole(value):
        return torch.full((count,), value)

    zero = torch.zeros(count, dtype=torch.int32)
    filtered = top_k > 0 or top_p < 1 or min_p > 0
    settings = (whole(temperature), whole(top_k), whole(top_p), whole(min_p))
    keys = (torch.full((count,), 1234), zero, torch.arange(count).int(), zero)
    return logits.expand(count, -1).contiguous(), SamplingRows(*settings, *keys, filtered=filtered, sampled=True)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 6}, {"temperature": 1.4, "top_p": 0.8}])
def test_draws_have_the_frequencies_of_the_distribution(settings):
    count = 20_000
    row = torch.linspace(0, 2.5, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    row[4] = -torch.inf
    logits, sampling = many(count, row, **settings)
    drawn = vocab_statistics(logits, sampling).token.bincount(minlength=12).double()
    kept = filter_cutoff(logits[:1], rows_of(sampling, slice(0, 1))).kept(logits[:1], 0)[0]
    tempered = (row * sampling.scale()[0]).masked_fill(~kept, -torch.inf)
    expected = tempered.double().softmax(-1) * count
    assert drawn[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # about 1 in 10,000


def test_banned_ids_are_never_drawn_and_a_single_id_always_is():
    row = torch.full((50,), -torch.inf)
    row[17] = -3.0
    logits, sampling = many(300, row)
    found = vocab_statistics(logits, sampling, entropy=True)
    assert (found.token == 17).all()
    assert torch.equal(found.confidence, torch.ones(300))
    assert not found.entropy.any()


def test_a_row_whose_every_id_is_banned_gives_no_nan():
    found = vocab_statistics(torch.full((2, 30), -torch.inf), None, entropy=True)
    assert torch.equal(found.confidence, torch.zeros(2))


def test_confidence_is_before_the_filters_unless_asked_for():
    logits, sampling = many(4, torch.tensor([2.0, 1.0, 0.0, 0.0]), temperature=0.5, top_k=1)
    asked = torch.tensor([True, False, True, False])
    found = vocab_statistics(logits, sampling, filtered_confidence=asked)
    before = float((logits[0] * 2).softmax(-1)[0])
    assert found.token.tolist() == [0] * 4
    assert found.confidence.tolist() == pytest.approx([1.0, before, 1.0, before])


def test_reference_takes_the_argmax_of_rounded_probabilities():
    logits, sampling = sampling_case(5, rows=30, vocab=200, dtype=torch.bfloat16)
    greedy = reference_statistics(logits, None)
    probabilities = torch.softmax(logits, -1)
    assert torch.equal(greedy.token, probabilities.argmax(-1))
    assert torch.equal(greedy.confidence, probabilities.amax(-1).float())
    sampled = reference_statistics(logits, sampling, filtered_confidence=torch.ones(30, dtype=torch.bool))
    kept = filter_cutoff(logits, sampling).kept(logits, 0)
    chosen = sampled.token[:, None]
    assert kept.gather(-1, chosen)[sampling.temperature > 0].all()
    assert (sampled.confidence > 0).all()


def test_reference_ties_go_to_the_lowest_id_where_float32_chooses_another():
    logits = torch.tensor([[0.0, 0.5, 0.50390625, 0.0, 0.0]]).bfloat16()
    assert vocab_statistics(logits, None).token.item() == 2
    assert reference_statistics(logits, None).token.item() == 1
