"""Stages that are compiled do what they do operation by operation, and only what was met while learning is compiled."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from replays import replaying
from test_strategies import requests_of
from tiny_engines import Answer, engine, run
from torch import Tensor

from linocut.engine import runner
from linocut.engine.fusion import Fusion

# Every shape of a plan: blocks of both kinds of families, a canvas, a window in another order, branches, a frontier.
PAIRS = [
    ("sdar", "threshold"),
    ("fast_dllm_v2", "hierarchical"),
    ("llada", "factor"),
    ("wedlm", "reorder"),
    ("sdar16", "freedave"),
    ("causal", "jacobi"),
]


class Counting:
    """A backend of torch.compile that runs what it is given, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Engines that are made from now on fuse with it."""
    torch._dynamo.reset()
    counting = Counting()
    monkeypatch.setattr(runner, "Fusion", lambda on: Fusion(True, counting))
    return counting


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
def test_a_text_is_the_same_where_stages_are_compiled(backend: Counting, family: str, strategy: str) -> None:
    """All that a strategy does can be traced: not one stage falls back."""
    core = engine(family)
    replaying(core)
    fusion = core.runner.fusion

    def answers() -> dict[tuple[str, int], Answer]:
        core.scheduler.prefix.clear()
        return run(core, requests_of(core, family, strategy))

    expected = answers()
    assert backend.graphs == 0
    with fusion.learning():
        assert answers() == expected
    assert fusion.on
    learned = backend.graphs
    assert learned >= 4, "planning, deciding, reporting, the window"
    assert answers() == expected
    assert backend.graphs == learned


def test_what_is_new_is_compiled_only_while_learning(backend: Counting) -> None:
    fusion = Fusion(True, backend)

    def stage(x: Tensor, name: str) -> Tensor:
        return x + len(name)

    fused, one = fusion(stage), torch.ones(4)
    assert fused(one, "ab")[0] == 3
    assert backend.graphs == 0
    with fusion.learning():
        assert fused(one, "ab")[0] == 3
    assert backend.graphs == 1
    assert fused(one, "abc")[0] == 4, "a variant that is not there"
    assert fused(one, "ab")[0] == 3
    assert backend.graphs == 1
    with fusion.learning(False):
        assert fused(one, "abcd")[0] == 5
    assert backend.graphs == 1
    assert not fusion.is_learning


def test_what_cannot_be_compiled_runs_as_it_is(backend: Counting, caplog: pytest.LogCaptureFixture) -> None:
    fusion = Fusion(True, backend)

    def stage(x: Tensor) -> float:
        return x.sum().item() if x[0] > 0 else 0.0

    with fusion.learning(), caplog.at_level(logging.WARNING, "linocut.engine"):
        assert fusion(stage)(torch.ones(4)) == 4.0
    assert not fusion.on
    assert "stage is not compiled" in caplog.text
