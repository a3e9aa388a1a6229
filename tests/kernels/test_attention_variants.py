"""What is compiled before the first request is all that batches ask for."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linocut.kernels import attention_triton
from linocut.kernels.attention_cuts import choose_config
from linocut.kernels.attention_variants import compile_attention, variants

SHAPES = [(4, 7, 128), (3, 3, 64), (8, 4, 128), (2, 7, 128), (8, 1, 256)]


def variant_of(config, tokens):
    cut = config.block_m, config.block_n, min(config.splits, 2), config.num_warps, config.num_stages
    return (*cut, int(config.splits > 8)), tokens <= 1024


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_of_all_kinds_find_theirs(shape, itemsize):
    most_rows, budget, longest = 200, 8192, 20_000
    known = variants(most_rows, budget, longest, *shape, 132, itemsize, 1024)
    draw, met = random.Random(0), set()
    for _ in range(5000):
        rows, width = draw.randint(1, most_rows), draw.randint(1, 40)
        query = draw.choice((width, width, draw.randint(width, budget)))
        tokens = min((rows - 1) * width + query, budget)
        visible = draw.choice((512, 2048, 8192, draw.randint(512, longest)))
        met.add(variant_of(choose_config(tokens, rows, query, visible, *shape, 132, itemsize), tokens))
    assert met <= set(known)
    assert len(met) > 0.5 * len(known), "and few besides"


@pytest.mark.parametrize("scratch", [False, True])
def test_each_is_launched_once(scratch, monkeypatch):
    launched, joined = [], []

    class Recorded:
        def __init__(self, into):
            self.into = into

        def __getitem__(self, grid):
            return lambda *arguments, **settings: self.into.append(settings)

    monkeypatch.setattr(attention_triton, "_attention_kernel", Recorded(launched))
    monkeypatch.setattr(attention_triton, "_join_kernel", Recorded(joined))
    monkeypatch.setattr(attention_triton, "overlap", lambda device, rows: {"OVERLAP": rows <= 1024})
    k_cache, v_cache = torch.zeros(2, 1, 16, 4, 128, dtype=torch.bfloat16)
    count = compile_attention(28, k_cache, v_cache, rows=8, tokens=4096, visible=3000, scratch=scratch)
    plain = [settings for settings in launched if not settings["SCRATCH"]]
    assert len(plain) == count
    assert {settings["SCRATCH"] for settings in launched} == {False, scratch}
    assert {settings["BLOCK_M"] for settings in launched} == {16, 32, 64, 128}
    assert {settings["SPLITS"] for settings in joined} == {8, 32}
