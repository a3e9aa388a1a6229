"""WeDLM's windows: which positions each forward fills, and the text, against its engine's."""

from __future__ import annotations

from typing import Any

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..params import DecodingParams
from .decode import Problem, compare, first_difference, judge
from .fixture import Fixture, Result
from .trace import Trace, greedy_request, trace_one


def run_wedlm(fixture: Fixture) -> list[Result]:
    results = []
    for case in fixture.cases("decode_cases"):
        core = _engine(fixture, case)
        prompt, most = case["prompt"], int(case["params"]["max_tokens"])
        # A forward that ends the text fills nothing in the reference; ours is not run.
        want = [{int(p): int(t) for p, t in step["set"]} for step in case["steps"] if step["set"]]
        last = len(prompt) + len(case["output"])

        def check(
            trace: Trace, case: dict[str, Any] = case, want: list[dict[int, int]] = want, last: int = last
        ) -> list[str]:
            # The reference learns that a text is at its end one forward later, and has filled more by then.
            ours = trace.steps if trace.steps[len(want) :] else [*trace.steps]
            wrong = first_difference(ours, want[: len(ours)])
            decided = {place for step in ours for place in step}
            missing = [place for place in range(len(case["prompt"]), last) if place not in decided]
            wrong += [f"positions {missing} of the text are not decided"] if missing else []
            return wrong + ([] if trace.tokens == case["output"] else ["another output"])

        request = greedy_request(case["name"], prompt, most, _decoding(core, case["params"]))
        results.append(judge(fixture, case, 1, compare(core, case, request, check)))
    results += [_batch(fixture, case) for case in fixture.cases("batch_cases")]
    return results


def _engine(fixture: Fixture, case: dict[str, Any]) -> EngineCore:
    return fixture.engine(None, tuple(case["params"]["stop_token_ids"]), "reference")


def _decoding(core: EngineCore, params: dict[str, Any]) -> DecodingParams:
    threshold = params["wedlm_entropy_threshold"]
    return resolve(
        core.info,
        {
            "strategy": "reorder",
            "window": params["window_size"],
            # Without a threshold one position is filled a forward.
            "entropy": 0.0 if threshold is None else threshold,
            "distance_penalty": params["wedlm_pos_penalty_factor"],
        },
    )


def _batch(fixture: Fixture, case: dict[str, Any]) -> Result:
    """All prompts in one batch of ours; each must also be what it is alone."""
    core = _engine(fixture, case)
    decoding = _decoding(core, case["params"])
    most = int(case["params"]["max_tokens"])
    answers: dict[str, list[int]] = {}
    requests = []
    for index, prompt in enumerate(case["prompts"]):
        requests.append(greedy_request(f"{case['name']}-{index}", prompt, most, decoding))
        answers[requests[-1].request_id] = []
        core.add(requests[-1])
    while core.busy:
        for output in core.step():
            answers[output.request_id].extend(output.token_ids)
    problems = []
    for request, want in zip(requests, case["outputs"], strict=True):
        name = request.request_id
        if answers[name] != want:
            problems.append(Problem(request.prompt, f"{name}: another output"))
        if answers[name] != trace_one(core, request).tokens:
            problems.append(Problem(request.prompt, f"{name}: another text in the batch than alone", ours=True))
    return judge(fixture, case, 1, problems)
