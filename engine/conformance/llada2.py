"""LLaDA2's loops: threshold with a schedule's floor, 2.1's token editing, and dInfer's decoders on LLaDA2 and LLaDA."""

from __future__ import annotations

from typing import Any

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..params import DecodingParams
from .decode import compare, first_difference, judge
from .fixture import Fixture, Result
from .trace import Trace, greedy_request, reference_steps


def run_llada2(fixture: Fixture) -> list[Result]:
    """The reference recomputes everything and caches nothing, which must be the same."""
    results = []
    for case in fixture.cases("decode_cases"):
        params = case["params"]
        block, length = int(params["block_length"]), int(params["gen_length"])
        # 2.1's loop decodes all of the length where it is not told to stop, and cuts the answer then.
        goes_on = "editing_threshold" in params and not params["eos_early_stop"]
        core = fixture.engine(block, () if goes_on else (int(params["eos_id"]),), "reference")
        if "editing_threshold" in params:
            wanted: dict[str, Any] = {
                "strategy": "edit",
                "threshold": params["threshold"],
                "edit_threshold": params["editing_threshold"],
                "post_steps": params["max_post_steps"],
                "transfer": params["num_to_transfer"],
            }
        else:
            steps = min(int(params["steps"]), length // int(params["minimal_topk"]), block)
            wanted = {"strategy": "threshold", "threshold": params["threshold"], "denoising_steps": steps}
        decoding = resolve(core.info, wanted)
        results.append(_run(fixture, core, case, decoding, reference_steps(case["steps"]), case["output"], length))
    return results


def _run(
    fixture: Fixture,
    core: EngineCore,
    case: dict[str, Any],
    decoding: DecodingParams,
    want: list[dict[int, int]],
    output: list[int],
    length: int,
) -> Result:
    """The reference fills its last block, whatever was asked for, and so do we here; the answer is cut to it."""
    prompt, block = case["prompt"], core.traits.block_size
    total = -(-(len(prompt) + length) // block) * block - len(prompt) if core.traits.context != "full" else length

    def check(trace: Trace) -> list[str]:
        # Where the reference stops inside a block ours completes it: what is behind the stop is no part of the text.
        wrong = first_difference(trace.steps[: len(want)], want)
        return wrong + ([] if trace.tokens[: len(output)] == output else ["another output"])

    request = greedy_request(case["name"], prompt, total, decoding)
    return judge(fixture, case, block, compare(core, case, request, check))


def run_dinfer(fixture: Fixture) -> list[Result]:
    results = []
    for kind in ("block_diffusion_cases", "full_attention_cases"):
        model = Fixture(fixture.folder, fixture.device, str(fixture.meta["checkpoints"][kind]), fixture.ranks)
        for case in fixture.cases(kind):
            params = case["params"]
            block, length, stop = int(params["block_length"]), int(params["gen_length"]), int(params["eos_id"])
            full = kind == "full_attention_cases"
            core = model.engine(None if full else block, (stop,) if params["early_stop"] else (), "reference")
            wanted = _dinfer(params)
            aligned = bool(params.get("start_block_align", True))
            if full:
                wanted |= {"cache": "none", "block_length": block, "aligned": aligned}
            origin = 0 if aligned else len(case["prompt"])
            want, output = _without_fill(case, stop if params["early_stop"] else None, block, origin)
            named = {**case, "name": f"{'full' if full else 'block'}_{case['name']}"}
            results.append(_run(fixture, core, named, resolve(core.info, wanted), want, output, length))
    return results


def _dinfer(params: dict[str, Any]) -> dict[str, Any]:
    wanted: dict[str, Any] = {"threshold": params["threshold"]}
    if params["decoder"] == "hierarchy":
        return {**wanted, "strategy": "hierarchical", "low_threshold": params["low_threshold"]}
    if params["decoder"] == "credit":
        weights = {"weight": "credit_alpha", "power": "boost_gamma", "decay": "decay_beta"}
        return {**wanted, "strategy": "credit", **{f"credit_{k}": params[v] for k, v in weights.items()}}
    return {**wanted, "strategy": "threshold"}


def _without_fill(
    case: dict[str, Any], stop: int | None, block: int, origin: int
) -> tuple[list[dict[int, int]], list[int]]:
    """Decisions and answer without what is behind a stop id: dInfer fills the rest with stop ids, at once."""
    prompt, output = len(case["prompt"]), list(case["output"])
    want = reference_steps(case["steps"])
    if stop is None or stop not in output:
        return want, output
    place = prompt + output.index(stop)
    end = origin + ((place - origin) // block + 1) * block
    kept = [{p: t for p, t in step.items() if p < end} for step in want]
    return [step for step in kept if step], output[: place - prompt + 1]
