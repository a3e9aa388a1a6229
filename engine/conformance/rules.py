"""Commit rules as pure functions: logits in, decided positions out, by the strategies themselves on hand-made views."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linocut.kernels.statistics import vocab_statistics

from ..decoding.advance import guard
from ..decoding.columns import Parameters
from ..decoding.halt import bar, margin_of
from ..decoding.registry import build_strategies, columns
from ..decoding.strategy import Strategy
from ..decoding.view import Decision, RowView, WindowStatistics
from ..family import FamilyTraits
from ..params import ParameterValue
from .fixture import Fixture, Result

# The reference's rule -> our strategy and what its parameters are called there.
_RULES: dict[str, tuple[str, dict[str, str]]] = {
    "dinfer_threshold": ("threshold", {"threshold": "threshold"}),
    "fastdllm_threshold": ("threshold", {"threshold": "threshold"}),
    "fastdllm_nov_threshold": ("threshold", {"threshold": "threshold"}),
    "fastdllm_factor": ("factor", {"factor": "factor"}),
    "dinfer_hierarchy": ("hierarchical", {"threshold": "threshold", "low_threshold": "low_threshold"}),
    "dinfer_hierarchy_fast_v2": ("hierarchical", {"threshold": "threshold", "low_threshold": "low_threshold"}),
    "dinfer_hierarchy_remask": (
        "hierarchical",
        {"threshold": "threshold", "low_threshold": "low_threshold", "remask_threshold": "remask_threshold"},
    ),
}
_ALL_MASK = "the reference decides nothing where the mask id is the best guess everywhere, and so never ends"
_MASK_GUESS = "the reference takes the mask id for a guess; here it cannot be one"
_NOTHING = "the reference decides nothing where no candidate passes, and so may never end"
_GLOBAL_BEST = "an older variant that decides the best alone where that is below low_threshold"


@dataclass
class Scene:
    """Rows of logits and what is decided of them. logits: [rows, W, V]; tokens: [rows, W], `mask` where undecided."""

    logits: Tensor
    tokens: Tensor
    mask: int
    strategy: Strategy
    values: dict[str, ParameterValue]
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        rows, window = self.tokens.shape
        traits = FamilyTraits("rules", "block-causal", "own", window, window, self.mask, ())
        self.traits = traits
        for name, memory in self.strategy.memory(self.values, traits).items():
            self.memory[name] = torch.zeros((rows, *memory.shape), dtype=memory.dtype)

    def view(self) -> RowView:
        rows, window = self.tokens.shape
        zeros = torch.zeros(rows, dtype=torch.int32)
        numbers, integers = columns().encode([self.values] * rows)
        view = RowView(
            slots=torch.arange(rows),
            start=zeros,
            final_len=zeros,
            prompt_len=zeros,
            limit=zeros + window,
            step=zeros + self.step,
            block=zeros + window,
            window=zeros + window,
            canvas=zeros,
            tokens=self.tokens.int(),
            decided=self.tokens != self.mask,
            fresh=zeros.bool(),
            drafts=zeros,
            draft_confidence=torch.zeros((rows, 1)),
            row_cost=torch.zeros(rows),
            sampled=zeros.bool(),
            parameters=Parameters(columns(), numbers, integers),
            memory=self.memory,
        )
        view.whole = torch.ones(rows, dtype=torch.bool)
        return view

    def decide(self) -> Decision:
        """One step: what the strategy and the guard decide; the tokens change with it."""
        view = self.view()
        statistics = self._statistics(view, self.logits)
        if self.strategy.biased:
            bias = self.strategy.bias(view, statistics, self.traits)
            statistics = self._statistics(view, self.logits.clone().scatter_add_(2, bias.ids, bias.values))
        decision = guard(view, statistics, self.strategy.decide(view, statistics, self.traits))
        for taken in (decision.commit, decision.overwrite):
            if taken is not None:
                self.tokens = torch.where(taken, decision.tokens, self.tokens)
        if decision.remask is not None:
            self.tokens = torch.where(decision.remask, self.mask, self.tokens)
        self.step += 1
        return decision

    def _statistics(self, view: RowView, logits: Tensor) -> WindowStatistics:
        banned = logits.clone()
        banned[..., self.mask] = -torch.inf
        found = vocab_statistics(banned.flatten(0, 1), None, entropy=True, margin=True)
        grid = self.tokens.shape
        assert found.entropy is not None
        assert found.margin is not None
        asked = self.strategy.plan(view, self.traits).targets
        return WindowStatistics(
            asked,
            found.token.view(grid),
            torch.where(asked, found.confidence.view(grid), -torch.inf),
            found.entropy.view(grid),
            found.margin.view(grid),
        )


def changed(scene: Scene) -> list[list[int]]:
    """One step: [row, position, new id] of what it changes."""
    before = scene.tokens
    scene.decide()
    rows, places = (scene.tokens != before).nonzero(as_tuple=True)
    return [[int(r), int(p), int(scene.tokens[r, p])] for r, p in zip(rows, places, strict=True)]


def run_rules(fixture: Fixture) -> list[Result]:
    results = [_rule(fixture, index, case) for index, case in enumerate(fixture.cases("rule_cases"))]
    results += [_credit(fixture, index, case) for index, case in enumerate(fixture.cases("credit_cases"))]
    results += [_threshold(index, case) for index, case in enumerate(fixture.cases("sched_threshold_cases"))]
    return results + [_statistic(fixture, index, case) for index, case in enumerate(fixture.cases("sched_stat_cases"))]


def _rule(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    rule = case["params"]["rule"]
    name = f"{rule}-{index}"
    meta = next(scene for scene in fixture.meta["scenes"] if scene["name"] == case["scene"])
    logits, tokens = fixture.tensors[meta["logits"]], fixture.tensors[meta["x"]]
    values: dict[str, ParameterValue]
    if rule == "fastdllm_topk":
        # As many steps as give k a step.
        strategy, values = "static", {"denoising_steps": max(int(meta["length"]) // int(case["params"]["k"]), 1)}
    else:
        strategy, names = _RULES[rule]
        values = {ours: case["params"][theirs] for theirs, ours in names.items()}
    mask = int(fixture.meta["mask_token_id"])
    got = changed(Scene(logits, tokens, mask, build_strategies(True)[strategy], values))
    want = sorted(case["changed"])
    if got == want:
        return Result(name, "pass")
    masks_guessed = bool((logits.argmax(-1) == mask)[tokens == mask].any())
    if masks_guessed:
        return Result(name, "known difference", _ALL_MASK if not want else _MASK_GUESS)
    if rule == "fastdllm_nov_threshold" and _without_bests(scene_rows(got), scene_rows(want)):
        return Result(name, "known difference", _NOTHING)
    if rule == "dinfer_hierarchy_fast_v2" and set(map(tuple, want)) <= set(map(tuple, got)):
        return Result(name, "known difference", _GLOBAL_BEST)
    return Result(name, "fail", f"decides {got}, the reference {want}"[:300])


def scene_rows(changes: list[list[int]]) -> dict[int, list[tuple[int, int]]]:
    rows: dict[int, list[tuple[int, int]]] = {}
    for row, place, token in changes:
        rows.setdefault(row, []).append((place, token))
    return rows


def _without_bests(got: dict[int, list[tuple[int, int]]], want: dict[int, list[tuple[int, int]]]) -> bool:
    """Whether ours decides one position where the reference decides none, and the same everywhere else."""
    return all(got[row] == want[row] if row in want else len(got[row]) == 1 for row in got) and set(want) <= set(got)


def _credit(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    params = case["params"]
    values: dict[str, ParameterValue] = {
        "threshold": params["threshold"],
        "credit_weight": params["alpha"],
        "credit_power": params["gamma"],
        "credit_decay": params["beta"],
    }
    sequence, tokens = fixture.tensors[case["logits_sequence"]], fixture.tensors[case["x"]]
    scene = Scene(sequence[0], tokens, int(fixture.meta["mask_token_id"]), build_strategies(True)["credit"], values)
    for step, want in enumerate(case["changed"]):
        scene.logits = sequence[step]
        got = changed(scene)
        if got != sorted(want):
            return Result(f"credit-{index}", "fail", f"step {step} decides {got}, the reference {want}"[:300])
    return Result(f"credit-{index}", "pass")


_MODES = {"linear": "linear", "cosine": "cosine", "exp": "exponential"}


def _threshold(index: int, case: dict[str, Any]) -> Result:
    """The bar after `step` of `total` steps."""
    values: dict[str, ParameterValue] = {
        "halt": _MODES[case["mode"]],
        "halt_high": case["high"],
        "halt_low": case["low"],
        "halt_rate": case["k"],
        "denoising_steps": case["total"],
    }
    tokens = torch.full((1, 4), 1)
    scene = Scene(torch.zeros(1, 4, 8), tokens, 1, build_strategies(True)["static"], values, step=case["step"])
    got = float(bar(scene.view(), torch.tensor([4])))
    good = abs(got - case["tau"]) <= 1e-5 * max(abs(case["tau"]), 1.0)
    return Result(f"bar-{index}", "pass" if good else "fail", "" if good else f"{got}, the reference {case['tau']}")


def _statistic(fixture: Fixture, index: int, case: dict[str, Any]) -> Result:
    logits = fixture.tensors[case["logits"]]
    best = logits.float().topk(2, dim=-1).values
    # Of names that it does not know the reference takes the mean.
    quantile = {"median": 0.5, "quantile": case["q"], "q": case["q"]}.get(case["stat"])
    values: dict[str, ParameterValue] = {"halt": "linear"} if quantile is None else {"halt_quantile": quantile}
    tokens = torch.full((1, logits.shape[0]), 1)
    scene = Scene(logits[None], tokens, 1, build_strategies(True)["static"], values)
    masks = torch.ones(1, logits.shape[0], dtype=torch.bool)
    got = float(margin_of(scene.view(), masks, (best[:, 0] - best[:, 1])[None]))
    good = abs(got - case["value"]) <= 1e-4
    if not good and case["stat"] == "median" and logits.shape[0] % 2 == 0:
        why = "of an even number of margins the reference takes the lower middle one, a quantile what is between"
        return Result(f"margin-{index}", "known difference", why)
    return Result(f"margin-{index}", "pass" if good else "fail", "" if good else f"{got}, not {case['value']}")
