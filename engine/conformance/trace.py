"""Runs requests through an engine core step by step and notes what each forward decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core import EngineCore
from ..messages import Abort, AddRequest
from ..params import DecodingParams, SamplingParams
from ..plan import StepPlan
from ..sequence import Sequence


@dataclass
class Trace:
    """tokens: the answer. steps: per forward that decided something, {position: token}. forwards: all of them."""

    prompt_len: int
    tokens: list[int] = field(default_factory=list)
    steps: list[dict[int, int]] = field(default_factory=list)
    forwards: int = 0
    finish: str | None = None


def greedy_request(
    name: str, prompt: list[int], max_tokens: int, decoding: DecodingParams, **sampling: Any
) -> AddRequest:
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return AddRequest(
        request_id=name,
        prompt=list(prompt),
        sampling=SamplingParams(**values),
        decoding=decoding,
    )


def trace_one(core: EngineCore, request: AddRequest, strangers: list[AddRequest] = [], delay: int = 0) -> Trace:  # noqa: B006
    """Run `request` to its end and trace it.

    `strangers` join `delay` steps before it, and once more, under other names, while it runs.
    """
    core.overlapping = False
    for stranger in strangers:
        core.add(stranger)
    for _ in range(delay):
        core.step()
    core.add(request)
    trace = Trace(len(request.prompt))
    late = [_renamed(stranger) for stranger in strangers]
    steps = 0
    while trace.finish is None:
        if late and steps == 2:
            core.add(late.pop())
        step_traced(core, request.request_id, trace)
        steps += 1
        if steps > 4000:
            raise RuntimeError(f"{request.request_id} does not end")
    for name in [s.request_id for s in strangers] + [f"{s.request_id}-late" for s in strangers]:
        core.abort(Abort(request_id=name))
    return trace


def step_traced(core: EngineCore, name: str, trace: Trace, before: Callable[[StepPlan], None] | None = None) -> None:
    """One engine step; adds what it did to the sequence `name` to `trace`. `before` may change the rows' state.

    No other step is under way then: from here on the engine does not run ahead any more.
    """
    core.overlapping = False
    plan = core.scheduler.schedule()
    if before is not None:
        core.launch(dataclasses.replace(plan, rows=[]))
        before(plan)
        plan = StepPlan(rows=plan.rows)
    planned = core.scheduler.planned()
    held = {s: (s.start, _held(s)) for s in planned}
    flight = core.launch(plan)
    reports = [] if flight is None else flight.land()
    for sequence, report in zip(planned, reports, strict=True):
        if sequence.request.request_id != name:
            continue
        start, before_it = held[sequence]
        trace.forwards += 1
        fresh = {
            start + i: token
            for i, (token, now) in enumerate(zip(report.window, report.decided, strict=True))
            if now and before_it.get(i) != token
        }
        if fresh:
            trace.steps.append(fresh)
    for sequence, tokens in core.scheduler.update(reports):
        if sequence.request.request_id == name:
            trace.tokens.extend(tokens)
            trace.finish = sequence.finish
        if sequence.finish:
            core.forget(sequence)
    core.scheduler.check()


def _held(sequence: Sequence) -> dict[int, int]:
    """Decided offsets of a sequence's window and their tokens."""
    held = dict(enumerate(sequence.tokens[sequence.start :]))
    held |= {i: token for i, token in enumerate(sequence.window) if sequence.decided[i]}
    return held


def _renamed(request: AddRequest) -> AddRequest:
    return AddRequest(
        request_id=f"{request.request_id}-late",
        prompt=request.prompt[1:] or request.prompt,
        sampling=request.sampling,
        decoding=request.decoding,
    )


def reference_steps(steps: list[dict[str, object]]) -> list[dict[int, int]]:
    """The fixture's steps with changes that share a forward merged, in order."""
    merged: dict[int, dict[int, int]] = {}
    for step in steps:
        entries: list[tuple[int, int]] = step["set"]  # type: ignore[assignment]
        merged.setdefault(int(step["nfe"]), {}).update({int(p): int(t) for p, t in entries})  # type: ignore[call-overload]
    return [changes for _, changes in sorted(merged.items()) if changes]
