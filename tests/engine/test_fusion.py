"""Stages that are compiled do what they do operation by operation, and only what was met while learning is compiled."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from replays import replaying
from test_strategies import requests_of
from tiny_engines import LIKELY, Answer, engine, prompt_of, request, run
from torch import Tensor

from linocut.engine import runner
from linocut.engine.fusion import Fusion
from linocut.engine.parallel.ranks import Ranks
from linocut.engine.parallel.vocabulary import VocabShare
from linocut.engine.sampling import stop_bounds

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
    """A backend of torch.compile that runs what it is given, and counts the graphs and their runs."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


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
        return run(core, requests_of(core, family, strategy)[-2:])

    expected = answers()
    assert backend.graphs == 0
    with fusion.learning():
        assert answers() == expected
    assert fusion.on
    learned = backend.graphs
    assert learned >= 4, "planning, deciding, reporting, the window"
    assert answers() == expected
    assert backend.graphs == learned


def test_stop_ids_are_barred_until_their_time(backend: Counting) -> None:
    core = engine("causal")
    replaying(core)

    def lengths() -> list[int]:
        core.scheduler.prefix.clear()
        kinds: list[dict[str, Any]] = [{"min_tokens": 7}, {}, {"min_tokens": 3, "temperature": 0.9}]
        asked = [
            request(core, str(at), prompt_of(9 + at), 12, stop_token_ids=tuple(LIKELY), **kind)
            for at, kind in enumerate(kinds)
        ]
        return [len(answer.tokens) for answer in run(core, asked).values()]

    with core.runner.fusion.learning():
        assert lengths() == [8, 1, 4]
    assert core.runner.fusion.on
    assert lengths() == [8, 1, 4]


def test_a_rank_bars_the_stop_ids_of_its_share(backend: Counting) -> None:
    fusion = Fusion(True, backend)
    fused = fusion(stop_bounds)
    stops = torch.tensor([[3, 70], [130, -1], [-1, -1]], dtype=torch.int32)
    stops_from = torch.tensor([[5, 9], [4, 0], [0, 0]], dtype=torch.int32)
    slot, position = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([4, 5, 9, 3, 3], dtype=torch.int32)
    barred = torch.zeros(5, 131, dtype=torch.bool)
    for row, ids in {0: [3, 70], 1: [70], 3: [130]}.items():
        barred[row, ids] = True
    with fusion.learning():
        for dtype in (torch.float32, torch.bfloat16):
            found = []
            for rank in range(2):
                share = VocabShare(131, Ranks(rank, 2))
                places, bounds = fused(stops, stops_from, slot, position, share, dtype)
                logits = torch.zeros(5, share.width, dtype=dtype).scatter_reduce_(1, places, bounds, "amin")
                found.append(logits[:, : share.held])
            assert torch.equal(torch.cat(found, dim=1) == -torch.inf, barred)
    assert fusion.on
    assert backend.graphs


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


def test_a_stage_that_was_not_met_while_learning_is_not_compiled_later(backend: Counting) -> None:
    fusion = Fusion(True, backend)
    first, second = fusion(lambda x: x + 1), fusion(lambda x: x + 2)
    with fusion.learning():
        first(torch.ones(4))
    assert second(torch.ones(4))[0] == 3
    assert backend.graphs == 1


def test_there_is_an_end_to_variants_in_any_thread(backend: Counting) -> None:
    fusion = Fusion(True, backend)

    def stage(x: Tensor, name: str) -> Tensor:
        return x + len(name)

    fused = fusion(stage)

    def learn() -> bool:
        with fusion.learning():
            return all(bool((fused(torch.ones(4), "x" * n) == 1 + n).all()) for n in range(70))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(learn).result()
    assert fusion.on
    assert 32 < backend.graphs < 70
    before = backend.runs
    assert fused(torch.ones(4), "xx")[0] == 3
    assert backend.runs == before + 1, "those that there are go on"


def test_a_request_with_more_stop_ids_runs_what_is_compiled(backend: Counting) -> None:
    core = engine("sdar")
    replaying(core)

    def runs(**sampling: Any) -> tuple[int, int]:
        core.scheduler.prefix.clear()
        before, steps = backend.runs, core.stats().forwards
        run(core, [request(core, "a", prompt_of(9), 12, {"strategy": "threshold"}, **sampling)])
        return backend.runs - before, core.stats().forwards - steps

    with core.runner.fusion.learning():
        runs()
    usual, steps = runs()
    assert usual >= 4 * steps > 0
    more, steps = runs(stop_token_ids=(3, 5, 7, 9, 11, 13))
    assert core.runner.state.stops.shape[1] > 4
    assert more >= 4 * steps > 0


def test_steps_that_no_graph_holds_run_as_they_are_written(backend: Counting) -> None:
    core = engine("sdar")
    replaying(core)
    core.runner._most = 40

    def answer(length: int) -> None:
        core.scheduler.prefix.clear()
        run(core, [request(core, "a", prompt_of(length), 4, {"strategy": "threshold"})])

    with core.runner.fusion.learning():
        answer(9)
    learned, before = backend.graphs, backend.runs
    with core.runner.fusion.learning():
        core.add(request(core, "long", prompt_of(90), 4, {"strategy": "threshold"}))
        core.step()
    assert (backend.graphs, backend.runs) == (learned, before)
    core.step()
    assert backend.runs > before, "the prompt is behind it"


def test_what_cannot_be_compiled_runs_as_it_is(backend: Counting, caplog: pytest.LogCaptureFixture) -> None:
    fusion = Fusion(True, backend)

    def stage(x: Tensor) -> float:
        return x.sum().item() if x[0] > 0 else 0.0

    with fusion.learning(), caplog.at_level(logging.WARNING, "linocut.engine"):
        assert fusion(stage)(torch.ones(4)) == 4.0
    assert not fusion.on
    assert "stage is not compiled" in caplog.text
