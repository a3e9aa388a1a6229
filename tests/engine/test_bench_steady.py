"""Benchmarks of steady steps: contexts that are claimed, rules that keep a pace, what is counted meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from converted import converted_folder
from replays import replaying
from tiny_engines import engine, prompt_of, request

from linocut.engine.bench.claimed import claimed_contexts
from linocut.engine.bench.closed_loop import run_clients
from linocut.engine.bench.paced import Pace, acceptance, cycle_of, refinements
from linocut.engine.bench.prefill import measure_prefill
from linocut.engine.bench.steady import DeviceClock, measure_steady
from linocut.engine.bench.variants import VARIANTS, Variant, first_of, paced, paces
from linocut.engine.config import EngineConfig
from linocut.engine.core import EngineCore
from linocut.engine.decoding.parameters import resolve
from linocut.engine.flight import Flight
from linocut.engine.loading import load_model
from linocut.engine.plan import StepPlan


def steps_until_prefilled(core: EngineCore) -> int:
    steps = 0
    while core.scheduler.waiting or any(s.prefilling for s in core.scheduler.running):
        core.step()
        steps += 1
    return steps


def test_claimed_contexts_are_pages_of_their_own_that_nobody_computes() -> None:
    core = engine("sdar", max_running=4)
    prompts = [prompt_of(160, seed) for seed in range(3)]
    with claimed_contexts(core):
        for index, prompt in enumerate(prompts):
            core.add(request(core, str(index), prompt, 8))
        steps_until_prefilled(core)
        pages = [page for sequence in core.scheduler.running for page in sequence.pages]
        assert len(pages) == len(set(pages)) >= 3 * 10
        assert core.stats().prefill_positions <= 3 * 16
        while core.busy:
            core.step()
    assert core.scheduler.pool.free == core.scheduler.pool.total
    core.add(request(core, "again", prompts[0], 4))
    steps_until_prefilled(core)
    assert core.scheduler.running[0].cached_tokens == 0, "what was claimed is not believed afterwards"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_blocks_with_sub_blocks_keep_the_pace_exactly(tokens: int, cached: bool) -> None:
    core = engine("fast_dllm_v2", max_running=4, max_model_len=1024)
    pace = Pace(core)
    at = paced(core, "blocks", {"strategy": "static", "sub_block_cache": cached}, tokens)
    assert at.cycle == 32 // tokens
    with claimed_contexts(core):
        found = measure_steady(core, first_of(pace, at), 3, 64, cycle=at.cycle, seconds=0.0)
    assert found.steps == at.cycle
    assert found.tokens_per_forward == pytest.approx(tokens)
    assert found.tokens_per_second * found.seconds == pytest.approx(3 * 32)
    assert (found.positions == 3 * 32) if not cached else (found.positions < 3 * 32)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar", "sdar16"])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("share", [0.003, 0.4])
def test_the_pace_is_the_same_where_steps_are_planned_ahead(
    family: str, tokens: int, cached: bool, share: float
) -> None:
    """On a GPU, and where a position is as dear as among hundreds of rows there."""
    core = engine(family, max_running=8, max_model_len=1024)
    replaying(core)
    core.overlapping = True
    core.scheduler.row_share = core.runner.row_share = share
    core.scheduler.forward_ms = 0.0  # never worth a wait
    pace = Pace(core)
    at = paced(core, "blocks", {"strategy": "static", "sub_block_cache": cached}, tokens)
    with claimed_contexts(core):
        found = measure_steady(core, first_of(pace, at), 3, 64, cycle=at.cycle, seconds=9.0, most=64)
    assert found.replays == 1
    assert found.tokens_per_forward == pytest.approx(tokens, rel=0.05)
    assert core.scheduler.pool.free == core.scheduler.pool.total


def test_a_pace_between_whole_numbers_of_forwards_is_as_near_as_it_can_be() -> None:
    core = engine("sdar16")
    assert refinements(3, 16, core.traits) == 5
    pace = Pace(core)
    at = paced(core, "blocks", {"strategy": "static"}, 3)
    with claimed_contexts(core):
        found = measure_steady(core, first_of(pace, at), 2, 32, cycle=at.cycle, seconds=0.0)
    assert found.tokens_per_forward == pytest.approx(16 / 5)


def test_as_many_drafts_are_right_as_are_wanted(tmp_path: Path) -> None:
    core = engine("causal", model=str(converted_folder(tmp_path / "model")), plain=True, max_model_len=2048)
    pace = Pace(core)
    asked = {"strategy": "verify", "draft_length": 4, "row_cost": 0.0}
    with claimed_contexts(core):
        for tokens in (1.0, 3.0, 3.5, 5.0):
            at = paced(core, "verify", asked, tokens)
            found = measure_steady(core, first_of(pace, at), 6, 64, seconds=9.0, most=60)
            assert found.steps == 60
            assert found.tokens_per_forward == pytest.approx(tokens, rel=0.001 if tokens.is_integer() else 0.1)
            assert found.tokens_per_second > 0


def test_what_a_draft_has_to_be_right_for_a_pace() -> None:
    assert acceptance(1, 4) == 0
    assert acceptance(5, 4) == pytest.approx(1)
    right = acceptance(3, 4)
    assert 1 + sum(right**n for n in range(1, 5)) == pytest.approx(3)


def test_paces_of_a_variant_are_those_that_it_can_have() -> None:
    core = engine("sdar")
    variant = Variant("v", "sdar-7b", 4, {"block": {"strategy": "static"}})
    assert [at.wanted for at in paces(core, variant, (1, 2, 4, 8))] == [1, 2, 4]
    assert [at.cycle for at in paces(core, variant, (1, 2, 4, 8))] == [4, 2, 1]
    assert cycle_of(resolve(core.info, {"strategy": "threshold"}).values, core.traits) == 1
    assert VARIANTS["converted"].modes["verify, 4 drafts"]["draft_length"] == 4


def test_the_devices_clock_tells_launches_from_what_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    core = engine("sdar")
    now = 0.0

    class Event:
        def __init__(self) -> None:
            self.at = now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def launch(plan: StepPlan) -> Flight | None:
        nonlocal now
        now += 0.25  # laid out, while the device waits
        began = Event()
        flight = real(plan)
        now += 3.0
        if flight is not None:
            flight._began, flight._done = began, Event()  # type: ignore[assignment]
        return flight

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    real = core.runner.launch
    monkeypatch.setattr(core.runner, "launch", launch)
    core.add(request(core, "a", prompt_of(9), 4, {"strategy": "static"}))
    core.runner = clock = DeviceClock(core.runner)  # type: ignore[assignment]
    steps = 0
    while core.busy:
        core.step()
        now += 0.5
        steps += 1
    within, between = clock.times()
    assert (within, between) == ([3.0] * steps, [0.75] * (steps - 1))
    assert clock.state is core.runner.state


def test_the_rules_cannot_be_replaced_under_captured_graphs() -> None:
    core = engine("sdar")

    class Graphs:
        captures = 1

    core.runner.graphs = Graphs()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="captured"):
        Pace(core)


def test_rows_that_end_while_they_are_timed_are_an_error() -> None:
    core = engine("sdar")
    with pytest.raises(RuntimeError, match="ended"):
        measure_steady(core, resolve(core.info, {"strategy": "static"}), 2, 240, cycle=64, seconds=0.0)
    assert not core.busy


@pytest.mark.parametrize("family", ["sdar", "fast_dllm_v2", "causal"])
def test_prefill_ends_with_every_prompts_first_token(family: str) -> None:
    core = engine(family)
    found = measure_prefill(core, resolve(core.info, {}), 3, 64, repeats=2)
    assert (found.sequences, found.prompt) == (3, 64)
    assert 0 < found.first_token_s <= found.seconds
    assert found.tokens_per_second == pytest.approx(3 * 64 / found.seconds)


def test_clients_ask_again_as_soon_as_they_are_answered() -> None:
    core = engine("sdar", prefix_caching=False)
    most = 0
    step = core.step

    def watched():
        nonlocal most
        most = max(most, len(core.scheduler.running) + len(core.scheduler.waiting))
        return step()

    core.step = watched  # type: ignore[method-assign]
    found = run_clients(core, resolve(core.info, {}), [prompt_of(9), prompt_of(14)], 3, 7, 8)
    assert (found.requests, found.tokens, most) == (7, 56, 3)
    assert found.tokens_per_second == pytest.approx(56 / found.seconds)


@pytest.mark.parametrize(("forward_ms", "waits"), [(1.0, False), (8.0, True)])
def test_a_step_waits_where_room_for_what_may_come_costs_more(forward_ms: float, waits: bool) -> None:
    """Whether a step ends its block is even odds here: rows have room for a commit and the next block, or know.

    48 positions more are a quarter of a forward, and a host takes half a millisecond for six rows.
    """
    core = engine("sdar16", max_running=8, max_model_len=1024)
    core.overlapping = True
    core.scheduler.row_share = core.runner.row_share = 0.005
    core.scheduler.forward_ms = forward_ms
    pace = Pace(core)
    at = paced(core, "blocks", {"strategy": "static"}, 8)
    under_way = []
    launch = core.launch

    def noting(plan: StepPlan) -> Flight | None:
        under_way.append(len(core._flights))
        return launch(plan)

    core.launch = noting  # type: ignore[method-assign]
    with claimed_contexts(core):
        found = measure_steady(core, first_of(pace, at), 6, 64, cycle=at.cycle, seconds=9.0, most=16)
    assert found.tokens_per_forward == pytest.approx(8)
    assert (found.padding < 1) == waits
    assert (0 in under_way[-16:]) == waits


def test_room_for_drafts_is_kept_where_masks_are_under_way_only(tmp_path: Path) -> None:
    for share, padded in ((0.003, True), (1.0, False)):
        core = EngineCore(load_model(EngineConfig(model=str(converted_folder(tmp_path / str(share))), device="cpu")))
        core.overlapping = True
        core.scheduler.row_share = core.runner.row_share = share
        core.scheduler.forward_ms = 1e-9
        decoding = resolve(core.info, {"strategy": "verify"})
        with claimed_contexts(core):
            found = measure_steady(core, decoding, 4, 32, cycle=8, seconds=0.0)
        assert (found.padding > 0) == padded
        assert (found.positions > 4) == padded, "without room it is the forward of `autoregressive`"
