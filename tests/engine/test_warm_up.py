"""What a start-up on a GPU runs before the first request."""

import pytest
from replays import replaying
from request_mix import alone, mixed_requests
from tiny_engines import FAMILIES, assert_empty, engine, prompt_of, request, run

from linocut.engine.errors import ConfigError
from linocut.engine.warm_up import make_ready, warm_up


@pytest.mark.parametrize("family", FAMILIES)
def test_it_meets_shapes_and_leaves_nothing_behind(family: str) -> None:
    core = engine(family, max_running=8)
    replays, blank = replaying(core), core.stats()
    warm_up(core, clients=(1, 2, 8, 16))
    assert {sum(group.last - group.first for group in shape.groups) for shape in replays.shapes} >= {1, 2, 8}
    largest = max(shape.tokens for shape in replays.shapes)
    assert largest >= 0.9 * core.info.token_budget, "a forward that is full of prompts"
    assert_empty(core)
    left = core.stats()
    assert left.pages_free == left.pages_total, "nor its prompts' pages"
    assert (left.forwards, left.committed_tokens, left.prefix_query_tokens) == (0, 0, 0)
    assert left.step_seconds == blank.step_seconds
    shapes = set(replays.shapes)
    for sampling in ({}, {"temperature": 1.0}):
        before = replays.replays
        replays.shapes.clear()
        run(core, [request(core, "plain", prompt_of(20), 30, **sampling)])
        met = len(shapes & set(replays.shapes))
        assert replays.replays > before
        assert met >= 0.5 * len(replays.shapes), "what a request meets that asks for nothing special"
    found, want = run(core, mixed_requests(core, family)), alone(family)
    assert {key: answer.text for key, answer in found.items()} == {key: answer.text for key, answer in want.items()}


def test_strategies_beside_the_default_are_made_ready_by_name() -> None:
    core = engine("sdar")
    make_ready(core, ("static",))
    assert core.stats().forwards == 0, "nothing is captured here"
    replays = replaying(core)
    make_ready(core, ("static",))
    assert {group.strategy for shape in replays.shapes for group in shape.groups} == {"threshold", "static"}
    with pytest.raises(ConfigError, match=r"strategy: .*verify"):
        engine("sdar", warm_up=("static", "verify"))


def test_a_model_of_short_texts_is_served_without() -> None:
    core = engine("sdar", max_model_len=32)
    warm_up(core)
    assert core.stats().forwards == 0
