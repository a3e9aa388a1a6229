"""Full-attention families on a canvas: LLaDA and Dream by Fast-dLLM v1's loops, Dream's own, and SchED's halt."""

from __future__ import annotations

from typing import Any

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..params import DecodingParams
from .decode import compare, first_difference, judge
from .fixture import Fixture, Result
from .trace import Trace, greedy_request, reference_steps

_LLADA_CACHE = {
    "generate": "none",
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
    "nov_generate": "none",
    "nov_generate_with_prefix_cache": "prefix",
}
_DREAM_ORDER = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def run_canvas(fixture: Fixture) -> list[Result]:
    """Decoding cases of a folder whose model fills canvases. These loops know no stop id."""
    results = []
    for case in fixture.cases("decode_cases"):
        core = fixture.engine(None, (), "reference")
        params = case["params"]
        wanted = _dream(params) if fixture.family in ("dream", "sched") else _llada(params)
        results.append(_run(fixture, core, case, resolve(core.info, wanted)))
    return results


def _run(fixture: Fixture, core: EngineCore, case: dict[str, Any], decoding: DecodingParams) -> Result:
    want = reference_steps(case["steps"])

    def check(trace: Trace) -> list[str]:
        wrong = first_difference(trace.steps, want)
        return wrong + ([] if trace.tokens == case["output"] else ["another output"])

    request = greedy_request(case["name"], case["prompt"], len(case["output"]), decoding)
    return judge(fixture, case, core.traits.block_size, compare(core, case, request, check))


def _llada(params: dict[str, Any]) -> dict[str, Any]:
    wanted = {"block_length": params["block_length"], "cache": _LLADA_CACHE[params["function"]]}
    if params.get("factor") is not None:
        return {**wanted, "strategy": "factor", "factor": params["factor"]}
    if params["threshold"] is not None:
        return {**wanted, "strategy": "threshold", "threshold": params["threshold"]}
    steps = params["steps"] // (params["gen_length"] // params["block_length"])
    return {**wanted, "strategy": "static", "denoising_steps": steps}


def _dream(params: dict[str, Any]) -> dict[str, Any]:
    blocks = params.get("function") == "block"
    length = params["block_length"] if blocks else params["max_new_tokens"]
    steps = params["steps"] // (params["max_new_tokens"] // length)
    cache = ("dual" if params["dual_cache"] else "prefix") if blocks else "none"
    wanted: dict[str, Any] = {"block_length": length, "cache": cache}
    if params["alg"] == "confidence_threshold":
        wanted |= {"strategy": "threshold", "threshold": params["threshold"]}
        return wanted if blocks else {**wanted, "pace": length // steps}
    order = _DREAM_ORDER[params["alg"]]
    wanted |= {"strategy": "static", "order": order, "schedule": "timed", "denoising_steps": steps}
    return wanted | (_halt(params) if "tau_mode" in params else {})


def _halt(params: dict[str, Any]) -> dict[str, Any]:
    modes = {"linear": "linear", "cosine": "cosine", "exp": "exponential"}
    wanted = {
        "halt": modes[params["tau_mode"]],
        "halt_high": params["tau_high"],
        "halt_low": params["tau_low"],
        "halt_rate": params["tau_k"],
        "halt_patience": params.get("patience_steps", 0),
        "halt_change": params.get("max_change_ratio", 0.0),
        "halt_progress": params.get("min_progress", 0.0),
    }
    quantile = {"quantile": params.get("q"), "median": 0.5}.get(params.get("stat", "mean"))
    return wanted if quantile is None else {**wanted, "halt_quantile": quantile}
