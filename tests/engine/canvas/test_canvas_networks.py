"""The networks of a canvas model, against the same in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_canvas import MASK, SIZES, VOCAB, Network, write_canvas

from linocut.engine.canvas.core import LoadedCanvas
from linocut.engine.canvas.guided import logit_gradient
from linocut.engine.canvas.loading import load_canvas
from linocut.engine.config import EngineConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedCanvas, Network, Network]:
    folder = tmp_path_factory.mktemp("canvas")
    student, judge = write_canvas(folder)
    return load_canvas(EngineConfig(model=str(folder), device="cpu", dtype="float32")), student, judge


def canvases(rows: int = 3) -> torch.Tensor:
    tokens = torch.randint(0, VOCAB - 1, (rows, SIZES["length"]), generator=torch.Generator().manual_seed(3))
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.6] = MASK
    return tokens


SIGMA = torch.tensor([0.0, 0.7, 6.9])


def test_the_denoiser_computes_what_plain_torch_does(checkpoint: tuple[LoadedCanvas, Network, Network]) -> None:
    loaded, student, _ = checkpoint
    with torch.no_grad():
        expected = student(canvases(), SIGMA)
        hidden = loaded.denoiser.hidden(canvases(), SIGMA)
        got = loaded.denoiser.logits(hidden.flatten(0, 1)).view_as(expected)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (expected[0] - student(canvases(), SIGMA[[1, 1, 1]])[0]).abs().max() > 0.1  # the noise level has a say


def test_the_discriminator_computes_what_plain_torch_does(checkpoint: tuple[LoadedCanvas, Network, Network]) -> None:
    loaded, _, judge = checkpoint
    assert loaded.reward is not None
    with torch.no_grad():
        expected = judge(canvases(), SIGMA)[..., 0]
        got = loaded.reward.scores(loaded.reward.embedding[canvases()], SIGMA)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loaded.reward.rewards(canvases(), SIGMA), expected.sum(-1), rtol=1e-3, atol=1e-3)


def test_the_gradient_of_the_reward_is_autograds(checkpoint: tuple[LoadedCanvas, Network, Network]) -> None:
    loaded, student, judge = checkpoint
    assert loaded.reward is not None
    tokens = canvases()
    masked = tokens == MASK
    with torch.no_grad():
        logits = student(tokens, SIGMA)
    leaf = logits.clone().requires_grad_()
    known = torch.nn.functional.one_hot(tokens, VOCAB).float() * 1e9
    (judge(torch.where(masked[..., None], leaf, known), SIGMA)[..., 0] * masked).sum().backward()

    soft = loaded.reward.embedding[tokens].clone()
    soft[masked] = logits[masked].softmax(-1) @ loaded.reward.embedding
    gradient = loaded.reward.gradient(soft, SIGMA, masked)
    got = logit_gradient(logits[masked], gradient[masked], loaded.reward.embedding)
    assert leaf.grad is not None
    assert leaf.grad[masked].abs().max() > 1e-2
    assert (got - leaf.grad[masked]).norm() / leaf.grad[masked].norm() < 1e-4
    assert leaf.grad[~masked].abs().max() == 0  # one-hot inputs do not move


def test_half_precision_stays_close(tmp_path: Path, checkpoint: tuple[LoadedCanvas, Network, Network]) -> None:
    write_canvas(tmp_path)
    half = load_canvas(EngineConfig(model=str(tmp_path), device="cpu", dtype="bfloat16"))
    assert half.info.dtype == "bfloat16"
    with torch.no_grad():
        full = checkpoint[0].denoiser.logits(checkpoint[0].denoiser.hidden(canvases(), SIGMA))
        got = half.denoiser.logits(half.denoiser.hidden(canvases(), SIGMA))
    assert got.dtype == torch.float32
    # Wide random weights amplify what bfloat16 rounds.
    assert torch.nn.functional.cosine_similarity(got.flatten(), full.flatten(), dim=0) > 0.95
