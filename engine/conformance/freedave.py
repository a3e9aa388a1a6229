"""FreeDave on SDAR: the texts of its loops, of the one-by-one baseline, and the groups that must be one text."""

from __future__ import annotations

from typing import Any

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..params import DecodingParams
from .decode import Problem, compare, judge
from .fixture import Fixture, Result
from .trace import Trace, greedy_request, trace_one


def run_freedave(fixture: Fixture) -> list[Result]:
    """Ours commits one single step more per forward than the reference, so the forwards of a decision differ by design;
    the text may not, and neither may ours take more forwards."""
    results, texts = [], {}
    for case in fixture.cases("decode_cases"):
        params, output = case["params"], case["output"]
        core = fixture.engine(int(params["block_length"]), (), "reference")

        def check(trace: Trace, case: dict[str, Any] = case, output: list[int] = output) -> list[str]:
            wrong = [] if trace.tokens == output else ["another output"]
            if trace.forwards > case["num_forwards"]:
                wrong.append(f"{trace.forwards} forwards, the reference takes {case['num_forwards']}")
            return wrong

        request = greedy_request(case["name"], case["prompt"], len(output), _decoding(core, params))
        problems: list[Problem] = compare(core, case, request, check)
        texts[case["name"]] = trace_one(core, request).tokens
        results.append(judge(fixture, case, core.traits.block_size, problems))
    for index, group in enumerate(fixture.cases("lossless_groups")):
        same = all(texts[name] == texts[group["cases"][0]] for name in group["cases"])
        results.append(Result(f"lossless-{index}", "pass" if same else "fail", "" if same else "texts differ"))
    return results


def _decoding(core: EngineCore, params: dict[str, Any]) -> DecodingParams:
    order = "sequential" if params.get("alg_temp") == -1 else "confidence"
    threshold = params.get("confidence_threshold")
    if params["function"] == "freedave":
        wanted = {"branches": params["draft_steps"], "row_cost": 0.0, "order": order, "threshold": threshold}
        return resolve(core.info, {"strategy": "freedave", **wanted})
    if threshold is not None:
        return resolve(core.info, {"strategy": "threshold", "threshold": threshold})
    return resolve(core.info, {"strategy": "static", "order": order})
