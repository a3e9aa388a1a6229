"""What the engine counts while a forward is planned and launched before the results of the last one are known."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from converted import converted_folder
from request_mix import STRATEGIES, mixed_requests
from tiny_engines import FAMILIES, assert_empty, engine, prompt_of, request, run

from linocut.engine import forecast
from linocut.engine.core import EngineCore
from linocut.engine.flight import Flight
from linocut.engine.histogram import Distribution
from linocut.engine.messages import Abort
from linocut.engine.plan import StepPlan
from linocut.engine.step_clock import StepClock

# `candidates` are counted as segments of full length, though some branches are shorter.
MIX = {
    **STRATEGIES,
    "causal": [{}, {"strategy": "jacobi", "draft_length": 5, "blocks": 3, "spawn_ratio": 0.4}, {"strategy": "jacobi"}],
    "llada": [{}, {"strategy": "static", "cache": "none", "denoising_steps": 3}],
    "wedlm": [{"strategy": "reorder"}, {"strategy": "jacobi"}, {"strategy": "autoregressive"}],
    "sdar": [*STRATEGIES["sdar"], {"strategy": "edit"}, {"strategy": "freedave"}, {"strategy": "pipeline"}],
    "sdar16": [*STRATEGIES["sdar16"], {"strategy": "pipeline", "threshold": 0.3}],
}


class Device:
    """Counts what an engine's forwards do: positions that write K/V to a page of a row, and all others."""

    def __init__(self, core: EngineCore) -> None:
        self.forwards = self.ran = self.padding = 0
        whole, size = core.runner.decoder.forward, core.info.page_size

        def forward(ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, *rest: Any) -> Any:
            real = int((slots >= size).sum())
            self.forwards += 1
            self.ran += real
            self.padding += slots.numel() - real
            return whole(ids, positions, slots, *rest)

        core.runner.decoder.forward = forward  # type: ignore[method-assign]


def observed(distribution: Distribution) -> int:
    return sum(distribution.counts)


def agree(core: EngineCore, device: Device) -> None:
    """Whatever was run is counted once, and everything that is counted adds up."""
    stats = core.stats()
    ran = stats.prefill_positions + stats.commit_positions + stats.denoise_positions
    assert ran == device.ran
    assert stats.padding_positions == device.padding
    assert stats.forwards == device.forwards == observed(stats.forward_seconds)
    assert stats.forwards == observed(stats.forward_positions) == observed(stats.forward_rows)
    assert stats.forward_positions.total == ran
    assert sum(stats.commits_by_reason.values()) == stats.committed_tokens + stats.discarded_tokens


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "llada", "wedlm"])
def test_counters_agree_with_the_device(family: str, ahead: bool) -> None:
    core = engine(family)
    core.overlapping = ahead
    device = Device(core)
    picks = MIX[family]
    requests = [
        request(core, str(n), prompt_of(5 + 17 * n % 90, seed=n), 12 + 3 * n, picks[n % len(picks)], seed=n,
                temperature=0.8 * (n % 2), stop_token_ids=tuple(range(90, 100)))
        for n in range(12)
    ]  # fmt: skip
    answers = run(core, requests, gap=2)
    agree(core, device)
    stats = core.stats()
    assert stats.committed_tokens == sum(len(answer.tokens) for answer in answers.values())
    assert sum(answer.positions for answer in answers.values()) == device.ran


@pytest.mark.parametrize("room", [None, 3, 16])
@pytest.mark.parametrize("row_cost", [0.0, 0.2, None])
def test_counters_agree_about_drafts(
    room: int | None, row_cost: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified drafting runs fewer rows than there is room for where they do not pay, or do not fit."""
    core = engine("causal", model=str(converted_folder(tmp_path)))
    if room is not None:
        monkeypatch.setattr(forecast, "_FEW", room)
        core.overlapping = True
    device = Device(core)
    asked = {"strategy": "verify", "draft_length": 7, **({} if row_cost is None else {"row_cost": row_cost})}
    run(core, [request(core, str(n), prompt_of(5 + 9 * n, seed=n), 24 + n, asked) for n in range(8)], gap=2)
    agree(core, device)
    stats = core.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens or row_cost != 0.0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_counters_agree_in_a_storm_of_aborts(family: str, ahead: bool) -> None:
    core = engine(family, pages=60)
    core.overlapping = ahead
    device, draw = Device(core), random.Random(family)
    requests = [
        message
        for _ in range(3)
        for message in mixed_requests(core, family)
        if not message.decoding.values.get("candidates")
    ]
    for number, message in enumerate(requests):
        core.add(msgspec.structs.replace(message, request_id=str(number)))
        for _ in range(draw.randint(0, 3)):
            core.step()
        if draw.random() < 0.6:
            core.abort(Abort(request_id=str(draw.randint(0, number))))
    while core.busy:
        core.step()
        if draw.random() < 0.2:
            core.abort(Abort(request_id=str(draw.randrange(len(requests)))))
    assert_empty(core)
    agree(core, device)


def test_a_forward_whose_choices_had_all_ended_is_idle() -> None:
    core = engine("causal", plain=True)
    core.overlapping = True
    device = Device(core)
    ends = run(core, [request(core, "a", prompt_of(9), 24, {"strategy": "autoregressive"})])["a", 0].tokens[10]
    assert core.stats().forwards_by_kind["idle"] == 0, "that max_tokens ends a text is known before"
    run(core, [request(core, "b", prompt_of(9), 24, {"strategy": "autoregressive"}, stop_token_ids=(ends,))])
    assert core.stats().forwards_by_kind["idle"] == 1
    agree(core, device)


def test_what_an_aborted_choice_had_decided_is_discarded() -> None:
    core = engine("sdar16")
    core.add(request(core, "a", prompt_of(16), 32, {"strategy": "static"}, ignore_eos=True))
    while core.stats().commits_by_reason["rule"] != 5:
        core.step()
    (sequence,) = core.scheduler.running
    behind = 5 - (len(sequence.tokens) - sequence.prompt_len)
    assert behind > 0
    core.abort(Abort(request_id="a"))
    assert core.stats().discarded_by_ending["abort"] == behind


def test_on_a_device_with_a_clock_gaps_are_its_own_and_idle_times_none() -> None:
    clock = StepClock()
    for measured, busy in (((0.01, None), True), ((0.02, 0.5), False), ((0.04, 99.0), True), ((0.08, 0.25), False)):
        clock.begin()
        clock.launch()
        clock.land(time.perf_counter(), measured)
        clock.end(busy)
    assert clock.forward_seconds.snapshot().total == pytest.approx(0.15)
    assert observed(clock.forward_seconds.snapshot()) == 4
    gaps = clock.host_gap_seconds.snapshot()
    assert (gaps.total, observed(gaps)) == (0.75, 2)


def test_what_has_landed_is_counted_once_the_device_has_work_again() -> None:
    core = engine("sdar")
    core.overlapping = True
    real, seen = core.runner.launch, []

    def counted() -> tuple[int, int]:
        return sum(core.stats().forwards_by_kind.values()), observed(core.clock.forward_seconds.snapshot())

    def launch(plan: StepPlan) -> Flight | None:
        seen.append(counted())
        return real(plan)

    core.runner.launch = launch  # type: ignore[method-assign]
    core.scheduler.schedule_ahead = lambda: None  # type: ignore[method-assign]
    core.add(request(core, "a", prompt_of(9), 6, {"strategy": "static"}))
    steps = 0
    while core.busy:
        core.step()
        steps += 1
        assert counted() == (steps, steps)
    # The first step launches two: the second one behind the landing of the first, which it does not wait to count.
    assert seen == [(max(nth - 1, 0),) * 2 for nth in range(steps)]
