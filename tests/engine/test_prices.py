"""What is run because it promises more than it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from converted import converted_folder
from test_verify import core_of, prompt_of, request, run

from linocut.engine.prices import marginal_cost, waiting_ms, worthwhile_masks


def test_a_row_costs_more_the_more_sequences_pay_for_it() -> None:
    costs = [marginal_cost(rows, share) for share in (0.003, 0.08) for rows in (1, 4, 16, 64)]
    assert costs[:4] == sorted(costs[:4])
    assert costs[4:] == sorted(costs[4:])
    assert all(0 < cost < 1 for cost in costs), "a position writes a token at most"
    assert 0.09 < marginal_cost(1, 0.08) < 0.1, "two tokens in eight positions"
    assert 0.5 < marginal_cost(256, 0.005) < 0.6, "one token in one position: eight would not pay themselves"


def test_waiting_for_the_host_takes_longer_with_more_rows() -> None:
    for rows, measured in ((8, 0.213), (64, 1.244), (256, 3.744)):
        assert measured < waiting_ms(rows) < 2.2 * measured, "other hosts are up to twice as slow"


def test_masks_are_as_many_as_pay() -> None:
    assert [worthwhile_masks(12, cost) for cost in (0.5, 0.25, 0.15, 0.1, 0.01)] == [1, 1, 2, 3, 7]
    assert worthwhile_masks(4, 0.0) == 4
    assert worthwhile_masks(1, 0.0) == 1


@pytest.mark.parametrize("source", ["previous", "own"])
def test_draft_segments_shrink_where_rows_are_dear(source: str, tmp_path: Path) -> None:
    """By the engine's price, and by a request's own; on what steps as graphs run, their length is one."""
    folder, lead = converted_folder(tmp_path, logit_source=source), int(source == "own")
    found = {}
    for share, asked, shortens in [(0.0, None, True), (0.2, None, True), (0.2, 0.0, True), (0.2, None, False)]:
        core, lengths = core_of(folder), set()
        core.runner.row_share = core.scheduler.row_share = share
        core.scheduler.shortens = shortens
        launch = core.launch

        def noting(plan, launch=launch, lengths=lengths):  # type: ignore[no-untyped-def]
            lengths |= {row.segment for row in plan.rows if row.segments}
            return launch(plan)

        core.launch = noting  # type: ignore[method-assign]
        values = {"draft_length": 4} if asked is None else {"draft_length": 4, "row_cost": asked}
        run(core, [request(core, "a/0", prompt_of(9, seed=1), 24, values)])
        found[share, asked, shortens] = {length - lead for length in lengths}
    assert list(found.values()) == [{4}, {2}, {4}, {4}]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_row_that_is_new_under_load_gets_no_room_for_drafts(tmp_path: Path, ahead: bool) -> None:
    """One row with a draft has all rows of its step draft: a group reads the vocabulary together."""
    folder, found = converted_folder(tmp_path), {}
    for share, asked in [(0.003, None), (1.0, None), (1.0, 0.0), (0.003, 1.0)]:
        core, drafting = core_of(folder), set()
        core.overlapping = ahead
        core.runner.row_share = core.scheduler.row_share = share
        launch = core.launch

        def noting(plan, launch=launch, drafting=drafting):  # type: ignore[no-untyped-def]
            drafting |= {row.segments > 0 for row in plan.rows}
            return launch(plan)

        core.launch = noting  # type: ignore[method-assign]
        values = {"draft_length": 4} if asked is None else {"draft_length": 4, "row_cost": asked}
        answers = run(core, [request(core, f"a/{at}", prompt_of(9, seed=at), 24, values) for at in range(3)])
        found[share, asked] = drafting, sorted((at, tuple(answer.tokens)) for at, answer in answers.items())
    assert [True in drafting for drafting, _ in found.values()] == [True, False, True, False]
    assert len({str(text) for _, text in found.values()}) == 1, "the text is the same"
