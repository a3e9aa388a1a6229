"""What is compiled before the first request is all that batches ask for."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.errors import TritonError

from linocut.engine.flags import SamplingFlags
from linocut.engine.layout import lay_out
from linocut.engine.plan import RowPlan
from linocut.kernels import attention_triton, attention_variants
from linocut.kernels.attention_cuts import choose_config
from linocut.kernels.attention_variants import compile_attention, variant_of, variants

SHAPES = [(4, 7, 128), (3, 3, 64), (8, 4, 128), (2, 7, 128), (8, 1, 256), (32, 1, 128)]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("most_rows", "budget", "longest"), [(200, 8192, 20_000), (8, 8192, 1024), (256, 2048, 3000)])
def test_batches_of_all_kinds_find_theirs(shape, itemsize, most_rows, budget, longest):
    known = variants(most_rows, budget, longest, *shape, 132, itemsize, 1024)
    draw, met = random.Random(0), set()
    for _ in range(3000):
        # Rows of a few positions, and perhaps a prompt beside them; many prompts at once; their contexts.
        count, width = draw.randint(1, most_rows), draw.choice((1, 4, 5, 8, 9, 25, 32, draw.randint(1, 600)))
        widths = [width] * count + [draw.randint(1, budget)] * draw.randint(0, 1)
        while sum(widths) > budget or len(widths) > most_rows:
            widths.pop(0)
        if not widths:
            continue
        context = min(max(max(widths), draw.choice((16, 40, 300, 900, draw.randint(1, longest)))), longest)
        plan = [RowPlan(slot, "autoregressive", width, 1, context) for slot, width in enumerate(widths)]
        for idle in (None, lambda strategy: most_rows):
            laid = lay_out(plan, [1] * len(plan), SamplingFlags(), 0.0, idle).shape
            sizes = laid.tokens, laid.rows, laid.query, laid.visible
            met.add(variant_of(choose_config(*sizes, *shape, 132, itemsize), laid.tokens, 1024))
    assert met <= set(known)
    assert len(met) > 0.4 * len(known)


def test_what_does_not_fit_a_gpu_is_left_out(monkeypatch, caplog):
    wanted = variants(8, 4096, 3000, 4, 7, 128, 132, 2, 1024)
    large = sum(config.block_m == 128 for config in wanted.values())

    def launch(heads, k_cache, v_cache, tokens, config, scratch):
        if config.block_m == 128:
            raise TritonError("out of shared memory")

    monkeypatch.setattr(attention_variants, "_launch", launch)
    k_cache, v_cache = torch.zeros(2, 1, 16, 4, 128, dtype=torch.bfloat16)
    count = compile_attention(28, k_cache, v_cache, rows=8, tokens=4096, visible=3000, scratch=False)
    assert 0 < large < len(wanted)
    assert count == len(wanted) - large
    assert caplog.text.count("out of shared memory") == large


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
    assert len(launched) == count == (2 if scratch else 1) * len(plain)
    assert {settings["SCRATCH"] for settings in launched} == {False, scratch}
    assert {settings["BLOCK_M"] for settings in launched} == {16, 32, 64, 128}
    assert {settings["SPLITS"] for settings in joined} == {8, 32}
