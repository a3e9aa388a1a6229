"""The draft head: proposals one after the other, in drafts and in blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from converted import converted_folder
from safetensors.torch import load_file, save_file
from tiny_engines import Answers, engine, prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.layout import StepShape
from linocut.engine.messages import AddRequest

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


def request_of(core: EngineCore, at: int, kind: int, diffusion: dict[str, Any], n: int = 1) -> AddRequest:
    prompt = prompt_of(6 + 5 * kind + at, seed=kind)
    return request(core, f"{at}/{kind}", prompt, 24 + at, diffusion, n=n, **SAMPLING[kind])


def serve(core: EngineCore, diffusion: list[dict[str, Any]], n: int = 1) -> Answers:
    kinds = range(len(SAMPLING))
    return run(core, [request_of(core, at, kind, rule, n) for at, rule in enumerate(diffusion) for kind in kinds])


def texts(answers: Answers) -> dict[tuple[str, int], list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


def test_the_verified_text_stays_the_autoregressive_one(tmp_path: Path) -> None:
    core = core_of(tmp_path, 0.2)
    verified = serve(core, [{"row_cost": 0.0}, {}, {"draft_length": 7}, {"draft_length": 1}])
    assert texts(verified) == texts(serve(core, [{"strategy": "autoregressive"}] * 4))


def test_one_product_for_texts_and_drafts_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each row has one segment, what it drafts from is known before anything is decided."""
    core = core_of(tmp_path, 0.2)
    if core.info.attention != "native":
        pytest.skip("no kernels that give each row its own bits")
    # So dear that no row has a second segment.
    rules = [{"row_cost": 0.2}, {"row_cost": 0.2, "draft_length": 3}]
    met: list[bool] = []
    certain = core.runner._drafts_are_certain

    def noted(shape: StepShape) -> bool:
        met.append(certain(shape))
        return met[-1]

    monkeypatch.setattr(core.runner, "_drafts_are_certain", noted)
    joint = serve(core, rules)
    assert any(met)
    monkeypatch.setattr(core.runner, "_drafts_are_certain", lambda shape: False)
    apart = serve(core, rules)
    assert texts(joint) == texts(apart)
    assert [a.forwards for a in joint.values()] == [a.forwards for a in apart.values()]


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


def test_sampled_blocks_are_drawn_from_the_whole_vocabulary(tmp_path: Path) -> None:
    """The head knows a few candidates; what a request asks of sampling holds with it as without."""
    rule = {"strategy": "threshold", "threshold": 0.3}
    for sampling in ({"temperature": 1.5, "seed": 1}, {"top_k": 1, "confidence": "filtered"}):
        asked = {**rule, **({"confidence": sampling["confidence"]} if "confidence" in sampling else {})}
        options = {name: value for name, value in sampling.items() if name != "confidence"}
        both = [
            run(core, [request(core, "a", prompt_of(9), 24, asked, **options)])["a", 0]
            for core in (core_of(tmp_path, None), core_of(tmp_path, 0.5))
        ]
        assert (both[0].tokens, both[0].forwards) == (both[1].tokens, both[1].forwards)


@pytest.mark.parametrize("gated", [True, False])
def test_every_mode_of_conversion_may_have_one(tmp_path: Path, gated: bool) -> None:
    folder = converted_folder(tmp_path, draft_head=0.2)
    if not gated:
        tensors = load_file(folder / "adapter.safetensors")
        save_file({n: t for n, t in tensors.items() if n.startswith("draft_head")}, folder / "adapter.safetensors")
        config = json.loads((folder / "config.json").read_text())
        del config["linocut"]["adapter"]
        (folder / "config.json").write_text(json.dumps(config))
    assert engine("causal", model=str(folder)).runner.decoder.draft_head is not None


def test_it_changes_proposals(tmp_path: Path) -> None:
    whole = [{"strategy": "static", "denoising_steps": 1}]
    one, other = serve(core_of(tmp_path, None), whole), serve(core_of(tmp_path, 0.5), whole)
    assert texts(one) != texts(other)


@pytest.mark.parametrize("tight", [{}, {"budget": 40}, {"pages": 9, "max_running": 5, "max_model_len": 96}], ids=str)
@pytest.mark.parametrize("source", ["previous", "own"])
@pytest.mark.parametrize("draft_head", [0.2, None])
def test_a_row_does_not_depend_on_its_neighbours(
    tmp_path: Path, source: str, draft_head: float | None, tight: dict[str, Any]
) -> None:
    """Nor on what it is cut into, and preempted, where budget and pages are short."""
    folder = converted_folder(tmp_path, draft_head=draft_head, logit_source=source)
    crowded = engine("causal", plain=True, model=str(folder), **tight)
    together = texts(serve(crowded, DIFFUSION, n=2))
    assert bool(crowded.stats().preemptions) == ("pages" in tight)
    core = engine("causal", plain=True, model=str(folder))
    for at, diffusion in enumerate(DIFFUSION):
        for kind, sampling in enumerate(SAMPLING):
            alone = run(core, [request_of(core, at, kind, diffusion, n=2)])
            for choice in range(2):
                assert alone[f"{at}/{kind}", choice].tokens == together[f"{at}/{kind}", choice], sampling
