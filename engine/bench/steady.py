"""What a step costs while a fixed number of sequences decode: seen from the host, and on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch

from ..core import EngineCore
from ..flight import Flight
from ..messages import Abort, AddRequest, EngineStats
from ..params import DecodingParams, SamplingParams
from ..runner import ModelRunner
from .collector import settled

# Steps before the first one that counts: a few, and at most so many until all graphs are captured.
_LEAD = 3
_WARM_STEPS = 96


@dataclass(frozen=True)
class Steady:
    """Steps of an engine at a steady load.

    step_ms: median time from one step's return to the next one's. device_ms: median on the device, from a launch, once
    the host has laid the step out, to its last kernel; gap_ms: median from there to the next launch. Both None on the
    CPU.
    positions: rows of a forward, on average, and padding: those beyond them that fill up a graph's size.
    tokens_per_forward: of a sequence. replays: share of the steps that replayed a graph.
    """

    sequences: int
    context: int
    steps: int
    seconds: float
    step_ms: float
    device_ms: float | None
    gap_ms: float | None
    positions: float
    padding: float
    tokens_per_second: float
    tokens_per_forward: float
    replays: float


class DeviceClock:
    """Stands in for an engine's runner and notes when each launch begins and ends on the device, without waiting."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, *arguments: Any, **named: Any) -> Flight | None:
        flight = self._runner.launch(*arguments, **named)
        if flight is not None and flight.events is not None:
            self._events.append(flight.events)
        return flight

    def times(self) -> tuple[list[float], list[float]]:
        """Milliseconds within and between the launches so far."""
        torch.cuda.synchronize(self._runner.state.device)
        within = [began.elapsed_time(ended) for began, ended in self._events]
        between = [one[1].elapsed_time(two[0]) for one, two in pairwise(self._events)]
        return within, between


def measure_steady(
    core: EngineCore,
    decoding: DecodingParams,
    sequences: int,
    context: int,
    *,
    cycle: int = 1,
    seconds: float = 1.0,
    most: int = 128,
    warm_seconds: float = 3.0,
) -> Steady:
    """Let `sequences` prompts of `context` random tokens decode, and time whole cycles of `cycle` steps.

    At least one cycle is timed, and as many as take `seconds`, but at most `most` steps. Raises RuntimeError if a
    sequence ends meanwhile.
    """
    with steady_load(core, decoding, sequences, context, cycle, warm_seconds) as pace:
        cycles = max(1, min(round(seconds / max(pace * cycle, 1e-9)), most // cycle))
        with settled():
            # What was under way has ended meanwhile: the first step would take no time.
            core.step()
            return _timed(core, sequences, context, cycles * cycle)


@contextmanager
def steady_load(
    core: EngineCore, decoding: DecodingParams, sequences: int, context: int, cycle: int, warm_seconds: float
) -> Iterator[float]:
    """Within, `sequences` prompts of `context` random tokens decode; gives seconds a step, about.

    They have run until two cycles were over and none captured a graph any more, or for `warm_seconds`. Raises
    RuntimeError if one of them has ended by the end.
    """
    names = _admit(core, decoding, sequences, context)
    try:
        with core.runner.learning():
            while core.scheduler.waiting or any(s.prefilling for s in core.scheduler.running):
                core.step()
            pace = _warm(core, cycle, warm_seconds)
        yield pace
        if len(core.scheduler.running) != sequences:
            raise RuntimeError(f"{sequences - len(core.scheduler.running)} of {sequences} sequences ended, or waited")
    finally:
        for name in names:
            core.abort(Abort(request_id=name))
        while core.busy:
            core.step()
        core.scheduler.prefix.clear()


def _admit(core: EngineCore, decoding: DecodingParams, sequences: int, context: int) -> list[str]:
    prompts = np.random.default_rng(sequences).integers(0, core.info.vocab_size, (sequences, context)).tolist()
    sampling = SamplingParams(max_tokens=core.info.max_model_len - context, temperature=0.0, ignore_eos=True)
    names = [f"steady-{index}" for index in range(sequences)]
    for name, prompt in zip(names, prompts, strict=True):
        core.add(AddRequest(request_id=name, prompt=prompt, sampling=sampling, decoding=decoding))
    return names


def _warm(core: EngineCore, cycle: int, seconds: float) -> float:
    """Step until nothing is captured any more; returns seconds a step of the last steps."""
    for _ in range(_LEAD):
        core.step()
    began, steps, fusion = time.perf_counter(), 0, core.runner.fusion
    compiling = fusion.seconds
    while True:
        before, start = core.stats(), time.perf_counter()
        turns = min(max(cycle, 4), 8)
        for _ in range(turns):
            core.step()
        after, now = core.stats(), time.perf_counter()
        steps += turns
        # A shape is captured when it comes again; forwards that are too large never are.
        replayed, captured = after.graph_forwards > before.graph_forwards, after.graph_captures > before.graph_captures
        spent = now - began - (fusion.seconds - compiling)
        if not replayed or spent > seconds or (steps >= 2 * cycle and not captured) or steps >= _WARM_STEPS:
            return (now - start) / turns


def _timed(core: EngineCore, sequences: int, context: int, steps: int) -> Steady:
    runner = core.runner
    clock = DeviceClock(runner) if runner.state.device.type == "cuda" else None
    if clock is not None:
        core.runner = cast(ModelRunner, clock)
    before, tokens = core.stats(), 0
    stamps = [time.perf_counter()]
    try:
        for _ in range(steps):
            tokens += sum(len(output.token_ids) for output in core.step())
            stamps.append(time.perf_counter())
    finally:
        core.runner = runner
    after = core.stats()
    within, between = clock.times() if clock is not None else ([], [])
    took = [later - earlier for earlier, later in pairwise(stamps)]
    forwards = after.forwards - before.forwards
    rows = after.forward_rows.total - before.forward_rows.total
    return Steady(
        sequences=sequences,
        context=context,
        steps=steps,
        seconds=stamps[-1] - stamps[0],
        step_ms=statistics.median(took) * 1e3,
        device_ms=statistics.median(within) if within else None,
        gap_ms=statistics.median(between) if between else None,
        positions=(_positions(after) - _positions(before)) / max(forwards, 1),
        padding=(after.padding_positions - before.padding_positions) / steps,
        tokens_per_second=tokens / (stamps[-1] - stamps[0]),
        tokens_per_forward=tokens / max(rows, 1),
        replays=(after.graph_forwards - before.graph_forwards) / steps,
    )


def _positions(stats: EngineStats) -> int:
    return stats.prefill_positions + stats.commit_positions + stats.denoise_positions
