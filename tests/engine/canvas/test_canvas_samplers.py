"""The ancestral and the guided sampler, against plain ones over the same noise, and by what they draw from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from canvas_engines import answer, canvas_core, request, run
from plain_canvas import MASK, SIZES, VOCAB, Network, PlainSampler, alpha, write_canvas

from linocut.engine.canvas.ancestral import ancestral_step
from linocut.engine.canvas.batch import build_batch
from linocut.engine.canvas.core import CanvasCore
from linocut.engine.canvas.guided import reranked_step, tilted_step
from linocut.engine.canvas.row import lay_out

LENGTH = SIZES["length"]
GUIDED = {"guidance_scale_start": 30.0, "guidance_scale_end": 40.0, "num_candidates": 4, "rerank_steps_ratio": 0.5}

Loaded = tuple[CanvasCore, PlainSampler]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Without begin and end ids: the canvas is the prompt and its continuation."""
    folder = tmp_path_factory.mktemp("canvas")
    student, judge = write_canvas(folder, ends=False)
    return canvas_core(folder, token_budget=4 * LENGTH), PlainSampler(student, judge, LENGTH)


PROMPTS = [[], [72, 105, 33]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["unprompted", "prompted"])
@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_an_ancestral_sample_is_the_plain_samplers(loaded: Loaded, prompt: list[int], steps: int) -> None:
    core, plain = loaded
    done = run(core, request(core, "a", prompt, n=2, max_tokens=LENGTH - len(prompt), diffusion=ancestral(steps)))
    for choice in range(2):
        assert prompt + answer(done["a", choice]) == plain.sample(prompt, 7, choice, steps)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["unprompted", "prompted"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"rerank_steps_ratio": 0.0}, {"rerank_steps_ratio": 1.0}, {"rerank_steps_ratio": 1.0, "num_candidates": 1}],
    ids=["both", "tilted", "re-ranked", "one candidate"],
)
def test_a_guided_sample_is_the_plain_samplers(loaded: Loaded, prompt: list[int], changes: dict[str, Any]) -> None:
    core, plain = loaded
    values = {**GUIDED, **changes}
    asked = {"strategy": "guided", "steps": 6, **values}
    done = run(core, request(core, "g", prompt, max_tokens=LENGTH - len(prompt), diffusion=asked))
    assert prompt + answer(done["g", 0]) == plain.sample(prompt, 7, 0, 6, **values)


def test_guidance_changes_the_text_and_so_does_its_scale(loaded: Loaded) -> None:
    core, _ = loaded
    asked = [
        {"strategy": "ancestral", "steps": 6},
        {"strategy": "guided", "steps": 6, "rerank_steps_ratio": 0.0},
        {"strategy": "guided", "steps": 6, "rerank_steps_ratio": 0.0, "guidance_scale_end": 900.0},
        {"strategy": "guided", "steps": 6, "rerank_steps_ratio": 1.0},
    ]
    done = run(core, *(request(core, str(i), [], diffusion=diffusion) for i, diffusion in enumerate(asked)))
    assert len({tuple(answer(outputs)) for outputs in done.values()}) == 4


def ancestral(steps: int) -> dict[str, Any]:
    return {"strategy": "ancestral", "steps": steps}


# ------------------------------------------------------------------------------------------ what is drawn from

ROWS = 6000


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[CanvasCore, Network, Network]:
    """Five tokens and the mask on four positions, so that frequencies say something."""
    folder = tmp_path_factory.mktemp("few")
    student, judge = write_canvas(folder, ends=False, vocab=6, length=4, tokenizer=False)
    return canvas_core(folder, token_budget=4 * ROWS), student, judge


@pytest.mark.parametrize("kind", ["ancestral", "tilted", "reranked"])
def test_a_step_draws_from_the_posterior(few: tuple[CanvasCore, Network, Network], kind: str) -> None:
    core, student, judge = few
    model, steps = core._model, 3
    diffusion: dict[str, Any] = {"strategy": "ancestral" if kind == "ancestral" else "guided", "steps": steps}
    asked = request(core, "r", [2], n=ROWS, diffusion=diffusion, ignore_eos=False)
    rows = [lay_out(model.shape, asked, choice, torch.device("cpu")) for choice in range(ROWS)]
    for row in rows:
        row.step = 1
    batch = build_batch(rows, 5, "torch")
    plain = PlainSampler(student, judge, 4, mask=5)
    x = torch.tensor([2, 5, 5, 5])
    t, s = (1 - (1 - 1e-5) * i / steps for i in (1, 2))
    if kind == "ancestral":
        ancestral_step(model.denoiser, batch)
        weights = plain.weights(plain.prediction(x), t, s)
    elif kind == "tilted":
        assert model.reward is not None
        tilted_step(model.denoiser, model.reward, batch, [35.0] * ROWS)
        weights = plain.weights(plain.tilted_logits(x, -math.log(alpha(t)), 35.0).softmax(-1), t, s)
    else:
        assert model.reward is not None
        reranked_step(model.denoiser, model.reward, batch, 1)
        with torch.no_grad():
            weights = plain.weights(student(x[None], torch.tensor([-math.log(alpha(t))]))[0].softmax(-1), t, s)
    expected = weights / weights.sum(-1, keepdim=True)
    assert (batch.tokens[:, 0] == 2).all()
    assert torch.equal(batch.tokens == 5, batch.undecided)
    for position in (1, 2, 3):
        seen = torch.bincount(batch.tokens[:, position], minlength=6) / ROWS
        deviation = (expected[position] * (1 - expected[position]) / ROWS).sqrt()
        assert ((seen - expected[position]).abs() <= 4 * deviation + 1e-6).all()
    # Positions are drawn independently: both masked as often as the product says.
    both = (batch.undecided[:, 1] & batch.undecided[:, 2]).float().mean()
    assert abs(both - expected[1, 5] * expected[2, 5]) < 4 * 0.5 / ROWS**0.5


def test_draws_are_the_same_in_triton(loaded: Loaded) -> None:
    pytest.importorskip("triton")
    core, _ = loaded
    asked = request(core, "r", [65], n=2, top_k=20, min_tokens=4, ignore_eos=False, seed=2**63 + 5)
    rows = [lay_out(core._model.shape, asked, choice, torch.device("cpu")) for choice in range(2)]
    torch_batch, triton_batch = (build_batch(rows, MASK, backend) for backend in ("torch", "triton"))
    row, position = torch_batch.masked()
    decided = torch_batch.decides(row, position, 0.1, 3)
    assert 0 < decided.sum() < decided.numel()
    assert torch.equal(decided, triton_batch.decides(row, position, 0.1, 3))
    logits = torch.randn(row.numel(), VOCAB, generator=torch.Generator().manual_seed(0))
    tokens = [batch.draw(logits.clone(), row, position, 1) for batch in (torch_batch, triton_batch)]
    assert torch.equal(*tokens)
    assert torch.equal(torch_batch.pick(torch.zeros(2, 4)), triton_batch.pick(torch.zeros(2, 4)))
    nowhere = row[:0]
    assert triton_batch.draw(logits[:0], nowhere, nowhere).numel() == 0


def test_candidates_are_drawn_by_their_rewards(few: tuple[CanvasCore, Network, Network]) -> None:
    core, _, _ = few
    asked = request(core, "r", [2], n=ROWS, ignore_eos=False)
    rows = [lay_out(core._model.shape, asked, choice, torch.device("cpu")) for choice in range(ROWS)]
    scores = torch.tensor([0.0, 1.0, -1.0])
    picked = build_batch(rows, 5, "torch").pick(scores.repeat(ROWS, 1))
    seen = torch.bincount(picked, minlength=3) / ROWS
    torch.testing.assert_close(seen, scores.softmax(-1), rtol=0, atol=4 * 0.5 / ROWS**0.5)
