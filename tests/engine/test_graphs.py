"""What surrounds the replay of a CUDA graph: sizes that repeat, and idle rows that change nothing."""

import numpy as np
import pytest
import torch
from replays import replaying
from request_mix import alone, mixed_requests, strangers
from tiny_engines import FAMILIES, MORE, engine, prompt_of, request, run

from linocut.engine.decoding.parameters import valid_names
from linocut.engine.flags import SamplingFlags
from linocut.engine.graphs import MAX_GRAPHS, most_positions
from linocut.engine.layout import StepLayout, array_size, lay_out, step_inputs
from linocut.engine.plan import RowPlan

IDLE = 99


def laid_out(rows: list[RowPlan], rounding: bool = True) -> StepLayout:
    return lay_out(rows, [4] * len(rows), SamplingFlags(), 0.5, (lambda strategy: IDLE) if rounding else None)


def row(slot: int, width: int, targets: int, end: int = 100, strategy: str = "threshold", segments: int = 0) -> RowPlan:
    return RowPlan(slot, strategy, width, targets, end, segments, 3 if segments else 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 33, 100, 129, 200])
@pytest.mark.parametrize("width", [1, 5])
def test_a_shape_holds_what_it_is_asked_for_and_adds_little(count: int, width: int) -> None:
    tokens = count * width
    assert tokens <= most_positions(10**10)
    layout = laid_out([row(i, width, 1, end=700) for i in range(count)])
    shape = layout.shape
    assert tokens <= shape.tokens < tokens * (2 if tokens <= 128 else 1.5 if tokens <= 256 else 1.25)
    assert count <= shape.rows < 2 * count
    assert count <= shape.logits < 2 * count
    assert shape.query >= width
    assert shape.visible >= 700
    assert layout.array.shape == (array_size(shape),)


def test_a_growing_load_needs_few_graphs() -> None:
    """Rows of one block, alone and with the commit of the block before, up to 64 of them over growing contexts."""
    seen = {
        laid_out([row(i, 8 if i < fused else 4, 4 - i % 2, end=context) for i in range(count)]).shape
        for count in range(1, 65)
        for fused in (0, count // 3, count)
        for context in (100, 900, 1800)
    }
    assert len(seen) <= MAX_GRAPHS / 2


@pytest.mark.parametrize("parameters", [10**8, 494 * 10**6, 6 * 10**8, 1.5 * 10**9, 10**10])
def test_what_may_be_captured_is_not_rounded_up_beyond_it(parameters: float) -> None:
    most = most_positions(int(parameters))
    assert laid_out([row(0, most, 0)]).shape.tokens == most
    assert laid_out([row(0, most - 1, 0)]).shape.tokens == most
    assert laid_out([row(0, most + 1, 0)]).shape.tokens > most


def test_prefills_that_fill_the_budget_are_one_size() -> None:
    """Of prompts of any lengths, the first and the last one of a step cut, as many as fit: nothing is padding."""
    core = engine("causal", max_running=64, token_budget=256)
    replays = replaying(core)
    asked = {"strategy": "autoregressive"}
    lengths = [20 + 7 * i % 40 for i in range(40)]
    run(core, [request(core, f"{i}", prompt_of(n, seed=i), 1, asked) for i, n in enumerate(lengths)])
    assert replays.replays == -(-sum(lengths) // 256)
    full = [shape for shape in replays.shapes if shape.tokens == 256]
    assert len(full) >= len(replays.shapes) - 1, "the last step has what is left"
    assert len(full) <= 2, "whatever the rows are"


def test_the_array_says_where_every_row_of_a_step_stands() -> None:
    rows = [row(7, 2, 1), row(3, 4, 0), row(5, 1, 1), row(8, 2, 2, strategy="verify", segments=2)]
    layout = laid_out(rows)
    inputs = step_inputs(torch.from_numpy(layout.array), layout.shape)
    assert layout.counts == [3, 1]
    assert inputs.slots.tolist() == [7, 3, 5, IDLE, 8]
    assert inputs.width.tolist() == [2, 4, 1, 0, 2]
    assert inputs.on_grid.tolist() == [1, 1, 1, 1, 0]
    assert inputs.query_start.tolist() == [0, 2, 6, 7, 7, 15], "draft segments are a row's own"
    assert inputs.row_of[:15].tolist() == [0] * 2 + [1] * 4 + [2] + [4] * 8
    assert inputs.offset[:15].tolist() == [0, 1, 0, 1, 2, 3, 0, *range(8)]
    assert (inputs.offset[15:] > 1e6).all(), "padding lies beyond every row"
    assert inputs.logit_row[:4].tolist() == [0, 2, 4, 4]
    assert inputs.logit_nth[:4].tolist() == [0, 0, 0, 1]
    assert inputs.row_cost.tolist() == [0.5]


def test_without_rounding_every_size_is_exact() -> None:
    layout = laid_out([row(i, 3, 2, end=77) for i in range(5)], rounding=False)
    shape = layout.shape
    assert (shape.rows, shape.tokens, shape.logits, shape.query, shape.visible) == (5, 15, 10, 3, 77)
    assert layout.lengths == [3] * 5
    assert np.array_equal(layout.array[:5], np.arange(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_are_replayed_give_the_same_texts(family: str) -> None:
    """All that a graph takes from the host at each replay is the array; idle rows fill up the sizes."""
    core = engine(family, max_running=24)
    replays = replaying(core)
    answers = run(core, strangers(core, family) + mixed_requests(core, family))
    want = alone(family)
    assert {key: answer.text for key, answer in answers.items() if key in want} == {k: a.text for k, a in want.items()}
    assert replays.replays > len(replays.shapes) > 0


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_strategy_is_replayed_beside_the_others(family: str) -> None:
    """Three rows of each, so that each has an idle row beside it."""

    def answers(replayed: bool) -> dict[tuple[str, int], object]:
        core = engine(family, max_running=64, token_budget=4096)
        replays = replaying(core) if replayed else None
        names = valid_names(core.info)
        requests = [
            request(core, f"{name}{i}", prompt_of(9 + 5 * i, seed=i), 12, {"strategy": name}, temperature=0.7 * i)
            for name in names
            for i in range(3)
        ]
        found = run(core, requests)
        assert replays is None or any(len(shape.groups) == len(names) for shape in replays.shapes)
        return {key: answer.text for key, answer in found.items()}

    assert answers(True) == answers(False)
