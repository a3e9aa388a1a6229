"""All layers in one call, in floats: the same as one by one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from converted import converted_folder
from safetensors.torch import load_file, save_file
from test_verify import core_of
from tiny_engines import GOLDEN, engine
from whole_forward import forward

from linocut.engine.core import EngineCore
from linocut.engine.models.embedded import cache_root
from linocut.kernels.native import load_native


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if not load_native(cache_root() / "native"):
        pytest.skip("no AVX2, or no C compiler")


def in_halves(folder: Path) -> Path:
    """Weights that float16 holds, which is what the kernels are for."""
    weights = {name: value.half().float() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def both(core: EngineCore, noisy: list[int]) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Hidden states and keys, in one call and one by one."""
    decoder = core.runner.decoder
    assert decoder.whole is not None
    together = forward(core, noisy)
    whole, decoder.whole = decoder.whole, None
    alone = forward(core, noisy)
    decoder.whole = whole
    return together, alone


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("noisy", [[], [6, 7, 8], [0, 3, 7]], ids=str)
def test_they_are_those_one_by_one(gated: bool, noisy: list[int], tmp_path: Path) -> None:
    folder = in_halves(converted_folder(tmp_path / "model", gated=gated))
    clean = min(noisy, default=9) if gated else 9
    for a, b in zip(*both(core_of(folder, plain=True), noisy), strict=True):
        assert torch.equal(a[:clean], b[:clean])
        # The sum of residual, base and adapter begins at another end.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_noisy_rows_apart_are_noisy_rows_together(tmp_path: Path) -> None:
    core = core_of(in_halves(converted_folder(tmp_path / "model")), plain=True)
    assert torch.equal(forward(core, [4])[0][:5], forward(core, [4, 6, 8])[0][:5])
    assert not torch.equal(forward(core, [4])[0][4], forward(core, [])[0][4])


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_norms_of_heads(quantization: str, tmp_path: Path) -> None:
    """Qwen3's. One by one they are torch's, which sums in another order."""
    shutil.copytree(GOLDEN / "sdar", tmp_path / "model")
    core = engine("sdar", model=str(in_halves(tmp_path / "model")), quantization=quantization)
    rounding = 2e-5 if quantization == "none" else 0.03
    for a, b in zip(*both(core, []), strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def test_weights_that_need_float32_go_one_by_one() -> None:
    assert engine("sdar").runner.decoder.whole is None
