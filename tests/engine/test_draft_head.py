"""The draft head: proposals one after the other, in drafts and in blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from converted import converted_folder
from tiny_engines import Answers, engine, prompt_of, request, run

from linocut.engine.core import EngineCore

SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.1, "seed": 4, "top_p": 0.8}]
DIFFUSION: list[dict[str, Any]] = [
    {"strategy": "threshold", "threshold": 0.1},
    {"strategy": "threshold", "threshold": 0.5},
    {"strategy": "static", "denoising_steps": 2},
    {"strategy": "static", "order": "sequential"},
]


def core_of(folder: Path, draft_head: float | None, **own: Any) -> EngineCore:
    return engine(
        "causal", plain=True, model=str(converted_folder(folder / str(draft_head), draft_head=draft_head, **own))
    )


def serve(core: EngineCore, diffusion: list[dict[str, Any]], **options: Any) -> Answers:
    requests = [
        request(core, f"{at}/{kind}", prompt_of(6 + 5 * kind + at, seed=kind), 24 + at, diffusion[at], **sampling)
        for at in range(len(diffusion))
        for kind, sampling in enumerate(SAMPLING)
    ]
    return run(core, requests, **options)


def texts(answers: Answers) -> dict[tuple[str, int], list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


def test_the_verified_text_stays_the_autoregressive_one(tmp_path: Path) -> None:
    core = core_of(tmp_path, 0.2)
    verified = serve(core, [{"row_cost": 0.0}, {}, {"draft_length": 7}, {"draft_length": 1}])
    assert texts(verified) == texts(serve(core, [{"strategy": "autoregressive"}] * 4))


def test_a_head_without_weights_changes_no_proposal(tmp_path: Path) -> None:
    """Whole blocks in one forward: then the confidence does not matter."""
    whole = [{"strategy": "static", "denoising_steps": 1}]
    plain, headed = core_of(tmp_path, None), core_of(tmp_path, 0.0)
    assert texts(serve(plain, whole)) == texts(serve(headed, whole))
    drafted = {"row_cost": 0.0, "draft_length": 5}
    one, other = (run(core, [request(core, "a", prompt_of(9), 40, drafted)])["a", 0] for core in (plain, headed))
    assert (one.tokens, one.forwards) == (other.tokens, other.forwards)


def test_a_proposal_behind_another_one_is_as_sure_as_both(tmp_path: Path) -> None:
    """So a threshold lets no more of them pass than without the head, and a first one as before."""
    plain, headed = core_of(tmp_path, None), core_of(tmp_path, 0.0)
    forwards: list[tuple[int, int]] = []
    for threshold in (0.02, 0.05, 0.1, 0.3):
        rule = [{"strategy": "threshold", "threshold": threshold}]
        before, after = (sum(a.forwards for a in serve(core, rule).values()) for core in (plain, headed))
        forwards.append((before, after))
    assert all(before <= after for before, after in forwards)
    assert any(before < after for before, after in forwards)


def test_it_changes_proposals(tmp_path: Path) -> None:
    whole = [{"strategy": "static", "denoising_steps": 1}]
    one, other = serve(core_of(tmp_path, None), whole), serve(core_of(tmp_path, 0.5), whole)
    assert texts(one) != texts(other)


@pytest.mark.parametrize("source", ["previous", "own"])
def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path, source: str) -> None:
    together = texts(serve(core_of(tmp_path, 0.2, logit_source=source), DIFFUSION, gap=2))
    core = core_of(tmp_path, 0.2, logit_source=source)
    for at, diffusion in enumerate(DIFFUSION):
        for kind, sampling in enumerate(SAMPLING):
            message = request(core, "a", prompt_of(6 + 5 * kind + at, seed=kind), 24 + at, diffusion, **sampling)
            assert run(core, [message])["a", 0].tokens == together[f"{at}/{kind}", 0]
