"""Learn2PD's filter by itself, and its loop on LLaDA, against the authors' loop."""

from __future__ import annotations

from typing import Any

from ..decoding.filter import Filter
from ..decoding.parameters import resolve
from ..decoding.strategy import Equipment
from .decode import compare, first_difference, judge
from .fixture import Fixture, Result
from .trace import Trace, greedy_request, reference_steps


def run_learn2pd(fixture: Fixture) -> list[Result]:
    results = []
    for index, case in enumerate(fixture.cases("filter_cases")):
        got = _filter(fixture, case["filter"])(fixture.tensors[case["confidence"]])
        error = float((got - fixture.tensors[case["logits"]]).abs().max())
        results.append(Result(f"filter-{index}", "pass" if error <= 1e-5 else "fail", f"largest error {error:.1e}"))
    for case in fixture.cases("decode_cases"):
        results.append(_decode(fixture, case))
    return results


def _filter(fixture: Fixture, prefix: str) -> Filter:
    return Filter(*(fixture.tensors[f"{prefix}.{name}"] for name in ("w1", "b1", "w2", "b2")))


def _decode(fixture: Fixture, case: dict[str, Any]) -> Result:
    params = case["params"]
    core = fixture.engine(None, (), "reference")
    # The folder keeps several filters beside its cases, a model folder holds one.
    core.equip(Equipment(_filter(fixture, params["filter"])))
    blocks = params["gen_length"] // params["block_length"]
    wanted = {
        "strategy": "learned",
        "filter_threshold": params["accept_thres"],
        "block_length": params["block_length"],
        "denoising_steps": params["steps"] // blocks,
        "cache": "none",
    }
    want = reference_steps(case["steps"])

    def check(trace: Trace) -> list[str]:
        wrong = first_difference(trace.steps, want)
        return wrong + ([] if trace.tokens == case["output"] else ["another output"])

    request = greedy_request(case["name"], case["prompt"], len(case["output"]), resolve(core.info, wanted))
    return judge(fixture, case, core.traits.block_size, compare(core, case, request, check))
