"""FreeDave on SDAR: the texts of its loops, of the one-by-one baseline, and the groups that must be one text; what it
drafts and accepts as pure functions."""

from __future__ import annotations

from typing import Any

import torch

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..decoding.strategies.freedave import UNDECIDED, branches, furthest, order_of, single_step
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
    results += [_verify(fixture, index, case) for index, case in enumerate(fixture.cases("verify_cases"))]
    return results + [_transfer(fixture, index, case) for index, case in enumerate(fixture.cases("transfer_cases"))]


def _verify(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    """The accepted one of the reference's branches, whose first is our present state."""
    mask, name = int(fixture.meta["mask_token_id"]), f"verify-{index}"
    states, targets = (torch.tensor([case[key]]) for key in ("draft", "target"))
    states, targets = (torch.where(ids == mask, UNDECIDED, ids) for ids in (states, targets))
    ran = torch.ones(states.shape[:2], dtype=torch.bool)
    accepted, _ = furthest(states, targets, ran, only_next=torch.zeros(1, dtype=torch.bool))
    got, want = int(accepted), int(case["accepted"])
    if got == want:
        return Result(name, "pass")
    if case["rule"] == "subset" and got < want:
        why = "a state that a step only passes is not accepted: the text would depend on the room for branches"
        return Result(name, "known difference", why)
    return Result(name, "fail", f"accepts branch {got}, the reference {want}")


def _transfer(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    """The states that are run next: a step on the present one, and further masks filled in order behind it.

    The reference's window may reach into the next block, which it drafts when this one's masks are used up.
    """
    mask, size, name = int(fixture.meta["mask_token_id"]), int(case["block_length"]), f"transfer-{index}"
    tokens, proposed = (torch.tensor([case[key][:size]]) for key in ("x", "x0"))
    confidence = fixture.tensors[case["confidence"]].view(1, -1)[:, :size]
    sequential = torch.tensor([case["alg_temp"] == -1])
    asked = -1.0 if case["confidence_threshold"] is None else float(case["confidence_threshold"])
    masks, order = tokens == mask, order_of(confidence, sequential)
    first = single_step(masks, order, confidence, torch.tensor([asked]))
    filled = first[:, None] | branches(masks & ~first, order, len(case["drafts"]))
    states = torch.where(filled, proposed[:, None], tokens[:, None])[0].tolist()
    got, want = [state + case["x"][size:] for state in states], case["drafts"]
    if got == want:
        return Result(name, "pass")
    if bool(sequential) and int(first.sum()) > 1:
        why = "from left to right the reference takes no notice of its threshold; here one above it is decided as well"
        return Result(name, "known difference", why)
    return Result(name, "fail", f"drafts {got}, the reference {want}"[:300])


def _decoding(core: EngineCore, params: dict[str, Any]) -> DecodingParams:
    order = "sequential" if params.get("alg_temp") == -1 else "confidence"
    threshold = params.get("confidence_threshold")
    if params["function"] == "freedave":
        wanted = {"branches": params["draft_steps"], "row_cost": 0.0, "order": order, "threshold": threshold}
        return resolve(core.info, {"strategy": "freedave", **wanted})
    if threshold is not None:
        return resolve(core.info, {"strategy": "threshold", "threshold": threshold})
    return resolve(core.info, {"strategy": "static", "order": order})
