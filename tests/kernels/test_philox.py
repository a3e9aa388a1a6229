"""Counter-based noise: published words, independence of everything but the key and the counter."""

from __future__ import annotations

import math

import pytest
import torch

from linocut.kernels.philox import GUMBEL_RANGE, gumbel_from_words, gumbel_noise, philox

ONES = 0xFFFFFFFF
KNOWN = [  # Random123's known answers for philox4x32 with 10 rounds: counter, key, words
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
]


def words_of(counter, key, rounds):
    split = [torch.tensor([value]) for value in (*counter, *key)]
    return [int(word) for word in philox(tuple(split[:4]), tuple(split[4:]), rounds)]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert words_of(counter, key, 10) == words


def plain_philox(counter, key, rounds):
    """The definition in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [c0, c1, c2, c3]


def test_any_counter_key_and_number_of_rounds():
    random = torch.Generator().manual_seed(1)
    for rounds in (1, 7, 10):
        values = torch.randint(0, 2**32, (6,), generator=random).tolist()
        assert words_of(values[:4], values[4:], rounds) == plain_philox(values[:4], values[4:], rounds)


def keys(rows):
    seed = torch.arange(rows) * 0x123456789ABCDEF - 5
    return seed, torch.zeros(rows, dtype=torch.int32), torch.arange(rows, dtype=torch.int32), torch.full((rows,), 3)


def test_noise_is_the_word_that_the_design_names():
    seed, choice, position, step = keys(3)
    noise = gumbel_noise(seed, choice, position, step, 0, 10)
    for row in range(3):
        key = (int(seed[row]) & ONES, (int(seed[row]) >> 32) & ONES)
        for token in range(10):
            word = plain_philox((token // 4, row, 3, 0), key, 7)[token % 4]
            uniform = (word + 0.5) / 2**32
            assert noise[row, token] == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-5, abs=1e-6)


def test_noise_depends_on_no_neighbour_and_on_no_slicing():
    rows = keys(8)
    whole = gumbel_noise(*rows, 0, 101)
    assert torch.equal(gumbel_noise(*(key[5:6] for key in rows), 0, 101)[0], whole[5])
    order = torch.randperm(8)
    assert torch.equal(gumbel_noise(*(key[order] for key in rows), 0, 101), whole[order])
    for start, width in [(0, 7), (7, 50), (57, 44), (3, 1)]:
        assert torch.equal(gumbel_noise(*rows, start, width), whole[:, start : start + width])


def test_each_part_of_the_key_matters():
    seed, choice, position, step = keys(1)
    base = gumbel_noise(seed, choice, position, step, 0, 64)
    others = [
        (seed + 1, choice, position, step),
        (seed + 2**32, choice, position, step),
        (seed, choice + 1, position, step),
        (seed, choice, position + 1, step),
        (seed, choice, position, step + 1),
    ]
    for other in others:
        assert (gumbel_noise(*other, 0, 64) == base).sum() == 0


def test_noise_is_gumbel():
    noise = gumbel_noise(*keys(64), 0, 4096).double().flatten()
    assert noise.mean() == pytest.approx(0.5772157, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.02)
    # Kolmogorov-Smirnov: the largest gap between the empirical and the true distribution
    ordered = noise.sort().values
    gap = (torch.exp(-torch.exp(-ordered)) - torch.arange(1, len(ordered) + 1) / len(ordered)).abs().max()
    assert gap < 1.63 / math.sqrt(len(ordered))


def test_noise_is_finite_for_every_word():
    extremes = torch.tensor([0, 1, 255, 2**31, ONES - 1, ONES])
    noise = gumbel_from_words(extremes)
    assert torch.isfinite(noise).all()
    assert noise[0] == noise.max()
    assert noise.max() - noise.min() <= GUMBEL_RANGE
