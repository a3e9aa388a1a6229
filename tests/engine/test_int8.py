"""`--quantization int8` by kernels of our own: the rows of a forward stay their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted_folder
from test_verify import DRAFTS, answers, core_of, texts
from whole_forward import forward

from linocut.engine.core import EngineCore
from linocut.engine.models.embedded import cache_root
from linocut.engine.models.linear import NativeInt8Linear
from linocut.kernels.native import load_native, multiplies_integers


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if not multiplies_integers():
        pytest.skip("a CPU with AVX-512 and without VNNI, or without AVX2")
    if not load_native(cache_root() / "native"):
        pytest.skip("no AVX2, or no C compiler")


@pytest.fixture(scope="module", params=[True, False], ids=["gated", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_folder(tmp_path_factory.mktemp("converted"), gated=request.param)


def integers(folder: Path, **overrides: Any) -> EngineCore:
    core = core_of(folder, quantization="int8", **overrides)
    assert core.runner.decoder.whole is not None
    return core


def test_verified_text_is_the_autoregressive_one(folder: Path) -> None:
    """Whatever is drafted, and beside strangers: many noisy rows, in several places of a forward."""
    expected = texts(answers(integers(folder), [{"strategy": "autoregressive"}] * len(DRAFTS)))
    found = answers(integers(folder), DRAFTS)
    assert texts(found) == expected
    assert sum(len(a.tokens) for a in found.values()) > 1.02 * sum(a.forwards for a in found.values())
    assert texts(answers(integers(folder, budget=256 + 8), DRAFTS)) == expected


def test_nor_does_a_draft_head_change_it(tmp_path: Path) -> None:
    core = integers(converted_folder(tmp_path, draft_head=0.3))
    expected = texts(answers(core, [{"strategy": "autoregressive"}] * 2))
    assert texts(answers(core, DRAFTS[:2])) == expected


def test_the_vocabulary_head_is_in_integers_too(folder: Path) -> None:
    # Without the wrapper that makes drafts right.
    assert isinstance(core_of(folder, quantization="int8", plain=True).runner.decoder.head, NativeInt8Linear)


def test_layers_in_one_call_are_those_one_by_one(folder: Path) -> None:
    core = integers(folder)
    together = forward(core, [6, 7, 8])
    core.runner.decoder.whole = None
    alone = forward(core, [6, 7, 8])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[:6], b[:6])
        # What an adapter adds is summed in another order, and a rounding of activations may go another way.
        torch.testing.assert_close(a[6:], b[6:], rtol=0.05, atol=0.05)


def test_noisy_rows_apart_are_noisy_rows_together(tmp_path: Path) -> None:
    """A row, in whatever company: the first noisy row sees nothing of those behind it."""
    core = integers(converted_folder(tmp_path))
    assert torch.equal(forward(core, [4])[0][:5], forward(core, [4, 6, 8])[0][:5])
    assert not torch.equal(forward(core, [4])[0][4], forward(core, [])[0][4])
