"""Top-k, top-p and min-p as one cutoff, against a plain ranking in Python."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from linocut.kernels import filters
from linocut.kernels.filters import filter_cutoff
from linocut.kernels.ragged import sampling_case

BACKENDS = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]


def kept_by_definition(logits, temperature, top_k, top_p, min_p):
    """The set of kept ids of one row."""
    scale = 1 / temperature if temperature > 0 else 1.0
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if 0 < top_k < len(ranked):
        ranked = ranked[:top_k]
    weights = [math.exp((logits[token] - logits[ranked[0]]) * scale) for token in ranked]
    if top_p < 1:
        reached, count = 0.0, 0
        while count < len(ranked) and (count == 0 or reached < top_p * sum(weights)):
            reached += weights[count]
            count += 1
        ranked = ranked[:count]
    if min_p > 0:
        ranked = [token for token, weight in zip(ranked, weights, strict=False) if weight >= min_p]
    return set(ranked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [37, 700])
def test_every_mix_of_filters_matches_the_definition(dtype, vocab):
    for seed in range(6):
        logits, sampling = sampling_case(seed, rows=24, vocab=vocab, dtype=dtype)
        kept = filter_cutoff(logits, sampling).kept(logits, 0)
        for row in range(24):
            settings = [float(part[row]) for part in (sampling.temperature, sampling.top_k)]
            settings += [float(part[row]) for part in (sampling.top_p, sampling.min_p)]
            expected = kept_by_definition(logits[row].tolist(), settings[0], int(settings[1]), *settings[2:])
            assert set(kept[row].nonzero()[:, 0].tolist()) >= expected
            extra = set(kept[row].nonzero()[:, 0].tolist()) - expected
            assert all(logits[row, token] == -math.inf for token in extra), settings


def test_a_tie_at_the_cut_keeps_the_lowest_ids():
    logits, sampling = sampling_case(0, rows=1, vocab=6)
    logits[0] = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.0, 1.0])
    sampling.temperature.fill_(1.0)
    sampling.top_k.fill_(3)
    sampling.top_p.fill_(1.0)
    sampling.min_p.fill_(0.0)
    assert filter_cutoff(logits, sampling).kept(logits, 0).tolist() == [[True, True, True, False, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_stops_where_the_sum_reaches_it(backend, dtype):
    logits, sampling = sampling_case(0, rows=3, vocab=5, dtype=dtype)
    logits[:] = torch.tensor([-7.0, -torch.inf, -7.0, -7.0, -7.0])
    sampling.temperature.fill_(0.5)
    sampling.top_k.zero_()
    sampling.top_p[:] = torch.tensor([0.5, 0.51, 1e-6])
    sampling.min_p.zero_()
    kept = filter_cutoff(logits, sampling, backend=backend).kept(logits, 0)
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [[0, 2], [0, 2, 3], [0]]


def test_rows_without_filters_keep_everything():
    logits, sampling = sampling_case(1, rows=3, vocab=50)
    sampling.top_k.zero_()
    sampling.top_p.fill_(1.0)
    sampling.min_p.zero_()
    assert filter_cutoff(logits, sampling).kept(logits, 0).all()


def test_the_ranking_widens_until_it_holds_the_longest_prefix(monkeypatch):
    logits, sampling = sampling_case(2, rows=16, vocab=700)
    whole = filter_cutoff(logits, sampling)
    monkeypatch.setattr(filters, "_CANDIDATES", (4, 64))
    short = filter_cutoff(logits, sampling)
    assert torch.equal(whole.kept(logits, 0), short.kept(logits, 0))


def test_slices_agree_with_the_whole():
    logits, sampling = sampling_case(3, rows=12, vocab=90)
    cutoff = filter_cutoff(logits, sampling)
    parts = [cutoff.kept(logits[:, start : start + 30], start) for start in (0, 30, 60)]
    assert torch.equal(torch.cat(parts, 1), cutoff.kept(logits, 0))
