"""Decode cases: traces and outputs against the reference's, alone and among strangers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..messages import AddRequest
from ..params import DecodingParams
from .fixture import Fixture, Result
from .trace import Trace, greedy_request, reference_steps, trace_one

# Quirks of a reference that we do not follow: (family, whether a prompt of a case is affected, reason), each reviewed.
KNOWN_DIFFERENCES: list[tuple[str, Callable[[dict[str, Any], list[int], int], bool], str]] = [
    (
        "fast_dllm_v2",
        lambda case, prompt, block: len(prompt) == block,
        "the reference does not prefill a prompt of exactly one block, and so ignores it",
    ),
    (
        "fast_dllm_v2",
        lambda case, prompt, block: (
            "prompts" in case and len(prompt) % block == 0 and len(prompt) > min(map(len, case["prompts"]))
        ),
        "the reference drops the token that opens the next block where an aligned prompt is not the batch's shortest",
    ),
    (
        "fast_dllm_v2",
        lambda case, prompt, block: "prompts" in case and bool(case["params"].get("use_block_cache")),
        "the reference refreshes the sub-block cache of all rows when one row needs it",
    ),
    (
        "learn2pd",
        lambda case, prompt, block: case["params"]["steps"] < case["params"]["gen_length"],
        "where the schedule asks for more than a block has left, the reference decides a mask of a later block",
    ),
    (
        "sched",
        lambda case, prompt, block: case["params"].get("average_over_masked") is False,
        "the reference averages the margins of the prompt too, which says nothing of what is left to decide",
    ),
]


@dataclass(frozen=True)
class Problem:
    """What is wrong with the answer to one prompt. A quirk of the reference may explain it unless it is `ours`."""

    prompt: list[int]
    text: str
    ours: bool = False


def judge(fixture: Fixture, case: dict[str, Any], block: int, problems: list[Problem]) -> Result:
    """A result from the problems found; mismatches that known quirks explain are a known difference."""
    if not problems:
        return Result(case["name"], "pass")
    reasons = set()
    for problem in problems:
        known = [
            why
            for family, applies, why in KNOWN_DIFFERENCES
            if family == fixture.family and applies(case, problem.prompt, block) and not problem.ours
        ]
        if not known:
            return Result(case["name"], "fail", "; ".join(p.text for p in problems)[:300])
        reasons.add(known[0])
    return Result(case["name"], "known difference", "; ".join(sorted(reasons)))


def strangers(core: EngineCore, seed: str, count: int = 3) -> list[AddRequest]:
    """Requests of mixed lengths and settings that share the batch with a case."""
    rng = random.Random(seed)
    requests = []
    for index in range(count):
        strategy = rng.choice(core.info.strategies)
        wanted: dict[str, Any] = {"strategy": strategy}
        if strategy == "threshold":
            wanted["threshold"] = rng.choice([0.3, 0.8])
        if strategy == "jacobi":
            wanted["draft_length"] = rng.choice([3, 9])
            wanted |= {"blocks": rng.choice([1, 3]), "candidates": rng.choice([0, 4])}
        prompt = [rng.randrange(core.info.vocab_size) for _ in range(rng.choice([1, 6, 35, 70]))]
        decoding = resolve(core.info, wanted)
        requests.append(greedy_request(f"stranger-{seed}-{index}", prompt, 40 + 10 * index, decoding))
    return requests


def compare(
    core: EngineCore,
    case: dict[str, Any],
    request: AddRequest,
    check: Callable[[Trace], list[str]],
) -> list[Problem]:
    """Run a case alone and among strangers; `check` names a trace's faults. Both must give one text in any case."""
    alone = trace_one(core, request)
    crowded = trace_one(core, request, strangers(core, case["name"]), delay=3)
    problems = [Problem(request.prompt, f"alone: {fault}") for fault in check(alone)]
    problems += [Problem(request.prompt, f"among strangers: {fault}") for fault in check(crowded)]
    if alone.tokens != crowded.tokens:
        problems.append(Problem(request.prompt, "another text among strangers than alone", ours=True))
    return problems


def first_difference(got: list[dict[int, int]], want: list[dict[int, int]]) -> list[str]:
    for index, (ours, theirs) in enumerate(zip(got, want, strict=False)):
        if ours != theirs:
            return [f"step {index} decides {ours}, the reference {theirs}"]
    return [] if len(got) == len(want) else [f"{len(got)} deciding steps, the reference has {len(want)}"]


def run_fast_dllm_v2(fixture: Fixture) -> list[Result]:
    results = []
    for case in fixture.cases("decode_cases"):
        params = case["params"]
        block = int(params["block_size"])
        core = fixture.engine(block, (int(params["stop_token"]),), "reference")
        decoding = _v2_decoding(core, params)
        # The reference counts whole blocks, and returns the token that opens the next one too.
        prompt = case["prompt"]
        tokens = int(params["max_new_tokens"]) // block * block - len(prompt) % block + 1
        if int(params["max_new_tokens"]) // block == 0 and len(prompt) % block:
            tokens = 0
        want = reference_steps(case["steps"])
        if tokens <= 0:
            nothing = not case["output"] and not want
            wrong = [] if nothing else [Problem(prompt, "the reference generates something here")]
            results.append(judge(fixture, case, block, wrong))
            continue

        def check(trace: Trace, case: dict[str, Any] = case, want: list[dict[int, int]] = want) -> list[str]:
            wrong = first_difference(trace.steps, want)
            return wrong + ([] if trace.tokens == case["output"] else ["another output"])

        request = greedy_request(case["name"], prompt, tokens, decoding)
        results.append(judge(fixture, case, block, compare(core, case, request, check)))
    results += [_v2_batch(fixture, case) for case in fixture.cases("batch_cases")]
    return results


def _v2_decoding(core: EngineCore, params: dict[str, Any]) -> DecodingParams:
    wanted = {
        "strategy": "threshold",
        "threshold": params["threshold"],
        "sub_block_size": params["small_block_size"],
        "sub_block_cache": params["use_block_cache"],
    }
    return resolve(core.info, wanted)


def _v2_batch(fixture: Fixture, case: dict[str, Any]) -> Result:
    """`batch_sample`: rows up to their first stop id must match, all of them in one batch of ours."""
    params = case["params"]
    block, stop = int(params["block_size"]), int(params["stop_token"])
    core = fixture.engine(block, (stop,), "reference")
    decoding = _v2_decoding(core, params)
    answers: dict[str, list[int]] = {}
    wanted: dict[str, list[int]] = {}
    requests = []
    for index, (prompt, row) in enumerate(zip(case["prompts"], case["outputs"], strict=True)):
        text = row[len(prompt) :]
        name = f"{case['name']}-{index}"
        wanted[name] = text[: text.index(stop) + 1] if stop in text else text
        answers[name] = []
        requests.append(greedy_request(name, prompt, len(wanted[name]), decoding))
        core.add(requests[-1])
    while core.busy:
        for output in core.step():
            answers[output.request_id].extend(output.token_ids)
    problems = []
    for request in requests:
        name = request.request_id
        if answers[name] != wanted[name]:
            problems.append(Problem(request.prompt, f"{name}: another output"))
        if answers[name] != trace_one(core, request).tokens:
            problems.append(Problem(request.prompt, f"{name}: another text in the batch than alone", ours=True))
    return judge(fixture, case, block, problems)


def run_sdar(fixture: Fixture) -> list[Result]:
    results = []
    for case in fixture.cases("decode_cases"):
        params = case["params"]
        block = int(params["block_length"])
        core = fixture.engine(block, tuple(params["stopping_criteria_idx"]), "reference")
        decoding = _sdar_decoding(core, params)
        prompt, length = case["prompt"], int(params["gen_length"])
        total = -(-(len(prompt) + length) // block) * block - len(prompt)
        want = reference_steps(case["steps"])
        sampling = {k: params[k] for k in ("temperature", "top_k", "top_p") if k in params}

        def check(
            trace: Trace, case: dict[str, Any] = case, want: list[dict[int, int]] = want, total: int = total
        ) -> list[str]:
            wrong = first_difference(trace.steps, want)
            mask = core.traits.mask_id  # noqa: B023
            text = [mask] * total
            for step in trace.steps:
                for position, token in step.items():
                    text[position - trace.prompt_len] = token
            return wrong + ([] if text == case["output"] else ["another output"])

        problems = compare(core, case, greedy_request(case["name"], prompt, total, decoding, **sampling), check)
        if "served" in case:
            served = trace_one(core, greedy_request(case["name"], prompt, length, decoding, **sampling))
            if served.tokens != case["served"]:
                problems.append(Problem(prompt, "another answer with max_tokens = gen_length"))
        results.append(judge(fixture, case, block, problems))
    return results


def _sdar_decoding(core: EngineCore, params: dict[str, Any]) -> DecodingParams:
    wanted: dict[str, Any] = {"denoising_steps": params["denoising_steps"]}
    if params["function"] == "opencompass":
        dynamic = params["threshold"] < 1.0
        wanted |= {"strategy": "threshold", "threshold": params["threshold"]} if dynamic else {"strategy": "static"}
        return resolve(core.info, wanted)
    rule = params["remasking_strategy"]
    wanted["confidence"] = "filtered"
    if rule == "low_confidence_dynamic":
        wanted |= {"strategy": "threshold", "threshold": params.get("confidence_threshold", 0.85)}
    elif rule in ("low_confidence_static", "sequential"):
        wanted |= {"strategy": "static", "order": "sequential" if rule == "sequential" else "confidence"}
    else:
        raise ValueError(f"unknown remasking strategy {rule}")
    return resolve(core.info, wanted)
