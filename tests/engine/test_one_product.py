"""Steps with draft segments read the vocabulary once, where that is for nothing, and decide and draft as they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted_folder
from replays import replaying
from test_verify import DRAFTS, SAMPLING, core_of
from tiny_engines import Answers, engine, prompt_of, request, run
from torch import Tensor

from linocut.engine.core import EngineCore
from linocut.engine.decoding.strategies.verify import MAX_DRAFT
from linocut.engine.layout import StepShape
from linocut.engine.messages import AddRequest


@dataclass
class Step:
    """What a step left, and how often it read the vocabulary. drafts: of each slot, -1 beyond; sure: of each draft."""

    shape: StepShape
    report: Tensor
    drafts: Tensor
    sure: Tensor
    products: int


def recorded(core: EngineCore) -> list[Step]:
    runner, steps, rows = core.runner, [], [0]
    step, head, state = runner.step, runner.decoder.head, runner.state

    def counted(hidden: Tensor) -> Tensor:
        rows.append(hidden.shape[0])
        return head(hidden)

    def noted(shape: StepShape, *arguments: Any) -> Tensor:
        rows.clear()
        report = step(shape, *arguments)
        nth = torch.arange(MAX_DRAFT)
        places = (state.start[:, None] + nth).clamp(max=state.tokens.shape[1] - 1).long()
        here = nth < state.drafts[:, None]
        drafts = torch.where(here, state.tokens.gather(1, places), -1)
        sure = torch.where(here, state.draft_confidence, 0.0)
        steps.append(Step(shape, report.clone(), drafts, sure, len(rows)))
        return report

    runner.decoder.head = counted
    runner.step = noted  # type: ignore[method-assign]
    return steps


def both_ways(
    make: Callable[[], EngineCore], requests: Callable[[EngineCore], list[AddRequest]]
) -> list[tuple[Answers, list[Step]]]:
    """Answers and steps of the same requests where steps of any size make one product, and where none does."""
    found = []
    for most in (10**6, 0):
        core = make()
        core.runner.joint_rows = most
        # The other way of making one product of two.
        core.runner._drafts_are_certain = lambda shape: False  # type: ignore[method-assign]
        steps = recorded(core)
        found.append((run(core, requests(core)), steps))
    return found


def assert_same(joint: list[Step], apart: list[Step]) -> None:
    assert len(joint) == len(apart)
    for one, other in zip(joint, apart, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.report, other.report)
        assert torch.equal(one.drafts, other.drafts)
        torch.testing.assert_close(one.sure, other.sure, rtol=1e-4, atol=1e-6)


def verifying(core: EngineCore) -> list[AddRequest]:
    """Drafts of all lengths and prices, so segments of all sizes and none; beside them no drafts at all; all kinds of
    sampling; and more than run at a time, so that some read their prompts."""
    return [
        request(core, f"{at}/{kind}", prompt_of(5 + 7 * kind + at, seed=kind), 20 + at, rule, **sampling)
        for at, rule in enumerate([*DRAFTS, {"strategy": "autoregressive"}])
        for kind, sampling in enumerate(SAMPLING)
    ]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("attention", ["auto", "torch"])
@pytest.mark.parametrize("draft_head", [0.2, None])
@pytest.mark.parametrize("source", ["previous", "own"])
def test_it_changes_no_text_no_draft_and_no_report(
    tmp_path: Path, source: str, draft_head: float | None, attention: str, rounded: bool
) -> None:
    folder = converted_folder(tmp_path, logit_source=source, draft_head=draft_head)

    def make() -> EngineCore:
        core = core_of(folder, attention=attention)
        if core.runner.decoder.draft_head is not None:
            # On a CPU candidates come from another, rougher product.
            core.runner.decoder.draft_head._quick = None
        if rounded:
            replaying(core)
        return core

    (answers, joint), (others, apart) = both_ways(make, verifying)
    assert answers == others
    assert_same(joint, apart)
    drafted = [at for at, step in enumerate(joint) if step.shape.scratch]
    assert len(drafted) > 20
    assert {joint[at].products for at in drafted} == {1}
    assert max(apart[at].products for at in drafted) > 1
    if not rounded:
        assert len({group.segments for step in joint for group in step.shape.groups}) > 3


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("causal", {"strategy": "jacobi", "draft_length": 5, "candidates": 4, "row_cost": 0.0}),
        ("sdar16", {"strategy": "freedave", "branches": 4, "row_cost": 0.0}),
    ],
)
def test_branches_have_theirs_in_it(family: str, rule: dict[str, Any]) -> None:
    """Beside other strategies, too."""

    def requests(core: EngineCore) -> list[AddRequest]:
        rules = [rule, {"strategy": "autoregressive" if family == "causal" else "threshold"}]
        return [
            request(core, f"{at}/{kind}", prompt_of(9 + kind + at, seed=at), 30, rule, **sampling)
            for at, rule in enumerate(rules)
            for kind, sampling in enumerate(SAMPLING[:3])
        ]

    (answers, joint), (others, apart) = both_ways(lambda: engine(family), requests)
    assert answers == others
    assert_same(joint, apart)
    assert {step.products for step in joint} == {1}
    assert {step.products for step in apart if step.shape.scratch} == {2}


def test_steps_of_many_rows_ask_for_what_they_need(tmp_path: Path) -> None:
    """There every row costs."""
    core = core_of(converted_folder(tmp_path))
    core.runner.joint_rows = 40
    steps = recorded(core)
    run(core, [request(core, str(at), prompt_of(9 + 9 * at), 20, {"row_cost": 0.0}) for at in range(4)], gap=3)
    products = {few: {s.products for s in steps if s.shape.scratch and (s.shape.tokens <= 40) == few} for few in (0, 1)}
    assert products == {1: {1}, 0: {2}}


def test_a_cpu_leaves_it(tmp_path: Path) -> None:
    assert core_of(converted_folder(tmp_path)).runner.joint_rows == 0
