"""Jacobi cases: the accept rule replayed draft by draft, and free runs that must give the greedy text."""

from __future__ import annotations

from typing import Any

import torch

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..messages import Abort
from ..plan import StepPlan
from .decode import Problem, compare, judge
from .fixture import Fixture, Result
from .trace import Trace, greedy_request, step_traced


def run_jacobi(fixture: Fixture) -> list[Result]:
    stop = (int(fixture.meta["stop_token_id"]),)
    results = []
    for case in fixture.cases("ar_cases"):
        core = fixture.engine(None, stop, "reference")
        decoding = resolve(core.info, {"strategy": "autoregressive"})
        request = greedy_request(case["name"], case["prompt"], int(case["max_tokens"]), decoding)

        def check(trace: Trace, want: list[int] = case["output"]) -> list[str]:
            return [] if trace.tokens == want else ["another text"]

        results.append(judge(fixture, case, 1, compare(core, case, request, check)))
    for case in fixture.cases("decode_cases"):
        stops = (int(case["params"]["eos"]),)
        replayed = _replay(fixture.engine(None, stops, "reference"), case)
        problems = [Problem(case["prompt"], text) for text in replayed]
        for numerics in ("reference", "fast"):
            problems += _free_run(fixture.engine(None, stops, numerics), case)
        results.append(judge(fixture, case, 1, problems))
    return results


def _free_run(core: EngineCore, case: dict[str, Any]) -> list[Problem]:
    """With drafts of our own the text is the autoregressive one, however many drafts are right."""
    want = case["ar_output"]
    decoding = resolve(core.info, {"strategy": "jacobi", "draft_length": case["params"]["block_len"]})

    def check(trace: Trace) -> list[str]:
        return [] if trace.tokens == want else ["the text is not the autoregressive one"]

    return compare(core, case, greedy_request(case["name"], case["prompt"], len(want), decoding), check)


def _replay(core: EngineCore, case: dict[str, Any]) -> list[str]:
    """Feed the reference's drafts; each forward must commit what it committed, and draft on from the same ids."""
    length = int(case["params"]["block_len"])
    decoding = resolve(core.info, {"strategy": "jacobi", "draft_length": length})
    # The reference overshoots max_tokens by up to a draft: leave it room.
    request = greedy_request(case["name"], case["prompt"], len(case["output"]) + 2 * length, decoding)
    core.add(request)
    trace = Trace(len(request.prompt))
    state = core.runner.state
    try:
        for index, step in enumerate(case["steps"]):
            start = int(step["len_before"])
            done = len(trace.steps)
            slot = 0

            def put_draft(plan: StepPlan, draft: list[int] = step["draft"][1:], start: int = start) -> None:
                nonlocal slot
                slot = plan.rows[0].slot
                state.tokens[slot, start : start + length - 1] = torch.tensor(draft, dtype=torch.int32)

            step_traced(core, request.request_id, trace, put_draft)
            want = {int(p): int(t) for p, t in step["set"]}
            if trace.steps[done:] != [want]:
                return [f"replayed forward {index} commits {trace.steps[done:]}, the reference {want}"]
            accepted = 0
            for guess, said in zip(step["draft"][1:], step["greedy"], strict=True):
                if guess != said:
                    break
                accepted += 1
            if trace.finish is None and accepted < length - 1:
                expected = step["greedy"][max(accepted, 1) :]
                at = start + max(accepted, 1)
                if state.tokens[slot, at : at + len(expected)].tolist() != expected:
                    return [f"replayed forward {index} drafts on from other ids"]
    finally:
        core.abort(Abort(request_id=request.request_id))
    return []
