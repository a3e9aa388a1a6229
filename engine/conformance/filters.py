"""Sampling filters, confidences and WeDLM's choice of positions as pure functions, against each family's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linocut.kernels.filters import filter_cutoff
from linocut.kernels.statistics import SamplingRows, reference_statistics

from ..decoding.registry import build_strategies
from .fixture import Fixture, Result
from .rules import Scene

_FILTERS_FIRST = "WeDLM filters before the temperature; here every family tempers first, as most of them do"


def run_filters(fixture: Fixture) -> list[Result]:
    results = [_filter(fixture, index, case) for index, case in enumerate(fixture.cases("filter_cases"))]
    results += [_rounded(fixture, index, case) for index, case in enumerate(fixture.cases("bf16_cases"))]
    results += [_dream(fixture, case) for case in fixture.cases("dream_cases")]
    return results + [_select(fixture, index, case) for index, case in enumerate(fixture.cases("wedlm_select_cases"))]


def _result(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-6) -> Result:
    error = float((got - want).abs().max())
    return Result(name, "pass" if error <= tolerance else "fail", "" if error <= tolerance else f"off by {error:.1e}")


def _filter(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    name = f"{case['reference']}-{index}"
    logits = fixture.tensors[case["logits"]].float()
    rows = logits.shape[0]
    sampling = SamplingRows(
        temperature=torch.full((rows,), float(case["temperature"])),
        top_k=torch.full((rows,), int(case["top_k"] or 0), dtype=torch.int32),
        top_p=torch.full((rows,), float(case["top_p"])),
        min_p=torch.zeros(rows),
        seed=torch.zeros(rows, dtype=torch.int64),
        choice=torch.zeros(rows, dtype=torch.int32),
        position=torch.zeros(rows, dtype=torch.int32),
        step=torch.zeros(rows, dtype=torch.int32),
        filtered=True,
        sampled=True,
    )
    tempered = logits / float(case["temperature"])
    kept = filter_cutoff(logits, sampling).kept(logits, 0)
    probabilities = tempered.masked_fill(~kept, -torch.inf).softmax(-1)
    found = _result(name, probabilities, fixture.tensors[case["probs"]])
    if case["reference"] == "wedlm":
        entropy = reference_statistics(logits, None, entropy=True).entropy
        assert entropy is not None
        if found.outcome == "fail":
            found = Result(name, "known difference", _FILTERS_FIRST)
        told = _result(name, entropy, fixture.tensors[case["confidence"]], 1e-5)
        return found if told.outcome == "pass" else told
    if found.outcome == "fail":
        return found
    # What stands for the confidence of `tempered` and `filtered`.
    of = tempered.softmax(-1) if case["reference"] == "sdar_opencompass" else probabilities
    token = torch.tensor(case["token"])[:, None]
    return _result(name, of.gather(1, token)[:, 0], fixture.tensors[case["confidence"]])


def _rounded(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    found = reference_statistics(fixture.tensors[case["logits"]], None)
    name = f"bf16-{index}"
    if found.token.tolist() != case["token"]:
        return Result(name, "fail", f"tokens {found.token.tolist()}, the reference {case['token']}")
    return _result(name, found.confidence, torch.tensor(case["confidence"]))


def _dream(fixture: Fixture, case: dict[str, Any]) -> Result:
    found = reference_statistics(fixture.tensors[case["logits"]], None, entropy=True, margin=True)
    assert found.entropy is not None
    assert found.margin is not None
    score = {
        "plain": found.confidence,
        "margin": found.confidence * -torch.expm1(-found.margin),
        "neg_entropy": -found.entropy,
    }[case["kind"]]
    name = f"dream-{case['kind']}"
    if found.token.tolist() != case["token"]:
        return Result(name, "fail", f"tokens {found.token.tolist()}, the reference {case['token']}")
    return _result(name, score, fixture.tensors[case["confidence"]], 1e-5)


def _select(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    """The masks stand at their window indices, decided tokens between them."""
    logits, places = fixture.tensors[case["logits"]].float(), case["window_indices"]
    width = places[-1] - places[0] + 1
    at = torch.tensor(places) - places[0]
    mask = logits.shape[1]
    tokens = torch.zeros((1, width), dtype=torch.int64)
    tokens[0, at] = mask
    # One id more, for the mask, which these functions do not know.
    spread = torch.zeros((1, width, mask + 1))
    spread[0, at, :mask] = logits
    values = {
        "window": width,
        "entropy": 0.0 if case["tau"] is None else case["tau"],
        "distance_penalty": case["lambda"],
    }
    scene = Scene(spread, tokens, mask, build_strategies(True)["reorder"], values)
    decision = scene.decide()
    chosen = decision.commit[0, at].nonzero()[:, 0].tolist()
    got = (chosen, decision.tokens[0, at][chosen].tolist())
    want = (case["selected"], case["tokens"])
    return Result(f"select-{index}", "pass" if got == want else "fail", "" if got == want else f"{got}, not {want}")
