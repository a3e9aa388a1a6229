"""A request's `diffusion` object: complete and valid parameters, or a 400 that names the field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linocut.engine.decoding.description import StrategyInfo
from linocut.engine.decoding.parameters import resolve, valid_names
from linocut.engine.decoding.registry import offered, strategy_classes
from linocut.engine.errors import ParameterError
from linocut.engine.family import Context, FamilyTraits


@dataclass(frozen=True)
class Model:
    context: Context = "block-causal"
    block_size: int = 32
    mask_id: int | None = 7
    reward: bool = False

    @property
    def strategy_table(self) -> tuple[StrategyInfo, ...]:
        size = self.block_size
        traits = FamilyTraits("some", self.context, "own", size, size, self.mask_id, (), reward=self.reward)
        return offered(traits).strategy_table


BLOCKS, CAUSAL, CONVERTED = Model(), Model("token-causal", 1, None), Model("token-causal", 4)
CANVAS, GUIDED = Model("canvas", 1024), Model("canvas", 1024, reward=True)


def refused(model: Model, requested: dict[str, Any] | None, *defaults: Any) -> str:
    with pytest.raises(ParameterError) as error:
        resolve(model, requested, *defaults)
    assert str(error.value)
    return error.value.param


@pytest.mark.parametrize("requested", [None, {}, {"strategy": None}, {"strategy": "threshold", "threshold": None}])
def test_nothing_asked_for_is_the_familys_default(requested: dict[str, Any] | None) -> None:
    params = resolve(BLOCKS, requested)
    assert params.strategy == "threshold"
    assert params.values == {"threshold": 0.9, "confidence": "tempered", "sub_block_cache": False}
    assert resolve(CAUSAL, None).strategy == "autoregressive"


def test_strategies_are_those_of_the_attention() -> None:
    assert [valid_names(model)[0] for model in (BLOCKS, CAUSAL, CONVERTED)] == ["threshold", "autoregressive", "verify"]
    assert {"threshold", "static"} <= {*valid_names(BLOCKS)}
    assert set(valid_names(CAUSAL)) == {"autoregressive", "jacobi"}
    assert {"verify", "threshold", "static", "autoregressive", "jacobi"} <= {*valid_names(CONVERTED)}
    assert valid_names(CANVAS) == ("ancestral",)
    assert valid_names(GUIDED) == ("guided", "ancestral")
    assert refused(CANVAS, {"strategy": "guided"}) == "diffusion.strategy"
    assert refused(CANVAS, {"strategy": "threshold"}) == "diffusion.strategy"
    assert refused(BLOCKS, {"strategy": "ancestral"}) == "diffusion.strategy"
    assert refused(BLOCKS, {"strategy": "jacobi"}) == "diffusion.strategy"
    assert refused(CAUSAL, {"strategy": "threshold"}) == "diffusion.strategy"


@pytest.mark.parametrize("name", ["", "Threshold", "nope", 5, True, ["static"], {"a": 1}, "x" * 10_000])
def test_an_unknown_strategy_is_refused(name: Any) -> None:
    with pytest.raises(ParameterError) as error:
        resolve(BLOCKS, {"strategy": name})
    assert error.value.param == "diffusion.strategy"
    assert len(str(error.value)) < 300


VALID: list[tuple[Model, dict[str, Any]]] = [
    (BLOCKS, {"threshold": 0.0}),
    (BLOCKS, {"threshold": 1.0}),
    (BLOCKS, {"threshold": 1}),
    (BLOCKS, {"denoising_steps": 1}),
    (BLOCKS, {"denoising_steps": 32}),
    (BLOCKS, {"sub_block_size": 1}),
    (BLOCKS, {"sub_block_size": 32}),
    (BLOCKS, {"sub_block_cache": True}),
    (BLOCKS, {"confidence": "filtered"}),
    (BLOCKS, {"strategy": "static", "order": "sequential"}),
    (CAUSAL, {"strategy": "jacobi", "draft_length": 2}),
    (CAUSAL, {"strategy": "jacobi", "draft_length": 256}),
    (CAUSAL, {"strategy": "jacobi", "blocks": 1, "candidates": 0, "spawn_ratio": 0.0}),
    (CONVERTED, {"strategy": "jacobi", "blocks": 8, "candidates": 16, "spawn_ratio": 1.0}),
    (CANVAS, {"steps": 1}),
    (CANVAS, {"steps": 4096}),
    (GUIDED, {"strategy": "ancestral", "steps": 1}),
    (GUIDED, {"guidance_scale_start": 0.0, "guidance_scale_end": 1000.0}),
    (GUIDED, {"num_candidates": 16, "rerank_steps_ratio": 1.0}),
]


@pytest.mark.parametrize(("model", "requested"), VALID, ids=str)
def test_valid_values_are_kept(model: Model, requested: dict[str, Any]) -> None:
    params = resolve(model, requested)
    asked = {key: value for key, value in requested.items() if key != "strategy"}
    assert {key: params.values[key] for key in asked} == asked


INVALID: list[tuple[Model, dict[str, Any], str]] = [
    (BLOCKS, {"threshold": -0.001}, "threshold"),
    (BLOCKS, {"threshold": 1.001}, "threshold"),
    (BLOCKS, {"threshold": float("nan")}, "threshold"),
    (BLOCKS, {"threshold": float("inf")}, "threshold"),
    (BLOCKS, {"threshold": True}, "threshold"),
    (BLOCKS, {"threshold": "0.9"}, "threshold"),
    (BLOCKS, {"threshold": [0.9]}, "threshold"),
    (BLOCKS, {"threshold": 10**400}, "threshold"),
    (BLOCKS, {"denoising_steps": 0}, "denoising_steps"),
    (BLOCKS, {"denoising_steps": -1}, "denoising_steps"),
    (BLOCKS, {"denoising_steps": 33}, "denoising_steps"),
    (BLOCKS, {"denoising_steps": 2**70}, "denoising_steps"),
    (BLOCKS, {"denoising_steps": 2.5}, "denoising_steps"),
    (BLOCKS, {"denoising_steps": True}, "denoising_steps"),
    (BLOCKS, {"denoising_steps": "8"}, "denoising_steps"),
    (BLOCKS, {"sub_block_size": 0}, "sub_block_size"),
    (BLOCKS, {"sub_block_size": 5}, "sub_block_size"),
    (BLOCKS, {"sub_block_size": 64}, "sub_block_size"),
    (BLOCKS, {"sub_block_cache": 1}, "sub_block_cache"),
    (BLOCKS, {"sub_block_cache": "true"}, "sub_block_cache"),
    (BLOCKS, {"confidence": "raw"}, "confidence"),
    (BLOCKS, {"confidence": 0}, "confidence"),
    (BLOCKS, {"strategy": "static", "order": "random"}, "order"),
    (CAUSAL, {"strategy": "jacobi", "draft_length": 1}, "draft_length"),
    (CAUSAL, {"strategy": "jacobi", "draft_length": 257}, "draft_length"),
    (CAUSAL, {"strategy": "jacobi", "draft_length": 16.0001}, "draft_length"),
    (CAUSAL, {"strategy": "jacobi", "draft_length": float("nan")}, "draft_length"),
    (CAUSAL, {"strategy": "jacobi", "blocks": 0}, "blocks"),
    (CAUSAL, {"strategy": "jacobi", "blocks": 9}, "blocks"),
    (CAUSAL, {"strategy": "jacobi", "blocks": True}, "blocks"),
    (CAUSAL, {"strategy": "jacobi", "candidates": -1}, "candidates"),
    (CAUSAL, {"strategy": "jacobi", "candidates": 17}, "candidates"),
    (CAUSAL, {"strategy": "jacobi", "candidates": 1.5}, "candidates"),
    (CAUSAL, {"strategy": "jacobi", "spawn_ratio": -0.01}, "spawn_ratio"),
    (CAUSAL, {"strategy": "jacobi", "spawn_ratio": 1.01}, "spawn_ratio"),
    (CAUSAL, {"strategy": "autoregressive", "blocks": 2}, "blocks"),
    (CANVAS, {"steps": 0}, "steps"),
    (CANVAS, {"steps": 4097}, "steps"),
    (CANVAS, {"steps": 2.5}, "steps"),
    (GUIDED, {"guidance_scale_start": -1}, "guidance_scale_start"),
    (GUIDED, {"guidance_scale_end": float("inf")}, "guidance_scale_end"),
    (GUIDED, {"num_candidates": 0}, "num_candidates"),
    (GUIDED, {"num_candidates": 17}, "num_candidates"),
    (GUIDED, {"rerank_steps_ratio": 1.01}, "rerank_steps_ratio"),
    # Of another strategy, or of none: nothing accepted is ignored.
    (CANVAS, {"num_candidates": 2}, "num_candidates"),
    (BLOCKS, {"order": "sequential"}, "order"),
    (BLOCKS, {"strategy": "static", "threshold": 0.9}, "threshold"),
    (CAUSAL, {"strategy": "autoregressive", "draft_length": 4}, "draft_length"),
    (BLOCKS, {"tresholt": 0.9}, "tresholt"),
    (BLOCKS, {"": 1}, ""),
    (BLOCKS, {"__class__": 1}, "__class__"),
]


@pytest.mark.parametrize(("model", "requested", "name"), INVALID, ids=lambda value: str(value)[:60])
def test_a_bad_value_is_refused_by_name(model: Model, requested: dict[str, Any], name: str) -> None:
    assert refused(model, requested) == f"diffusion.{name}"


def test_what_is_refused_is_not_repeated_at_length() -> None:
    with pytest.raises(ParameterError) as error:
        resolve(BLOCKS, {"y" * 100_000: 1})
    assert len(error.value.param) <= 80
    assert len(str(error.value)) < 300


# ---------------------------------------------------------------------- the operator's defaults

DEFAULTS = ("static", {"denoising_steps": 8, "confidence": "filtered"})


def test_the_operators_defaults_fill_what_a_request_leaves_out() -> None:
    assert resolve(BLOCKS, None, *DEFAULTS).strategy == "static"
    assert resolve(BLOCKS, None, *DEFAULTS).values["denoising_steps"] == 8
    params = resolve(BLOCKS, {"denoising_steps": 4, "confidence": None}, *DEFAULTS)
    assert (params.values["denoising_steps"], params.values["confidence"]) == (4, "filtered")


def test_the_operators_defaults_belong_to_the_operators_strategy() -> None:
    params = resolve(BLOCKS, {"strategy": "threshold"}, *DEFAULTS)
    assert params == resolve(BLOCKS, {"strategy": "threshold"})


def test_a_resolved_request_resolves_to_itself() -> None:
    for model in (BLOCKS, CAUSAL):
        for name in valid_names(model):
            once = resolve(model, {"strategy": name})
            assert resolve(model, {"strategy": name, **once.values}) == once


def test_resolving_leaves_its_arguments_alone() -> None:
    requested, defaults = {"strategy": "static", "order": "sequential"}, {"denoising_steps": 8}
    resolve(BLOCKS, requested, "static", defaults)
    assert (requested, defaults) == ({"strategy": "static", "order": "sequential"}, {"denoising_steps": 8})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({field for cls in strategy_classes().values() for field in cls.Params.__struct_fields__})


@given(
    st.sampled_from([BLOCKS, CAUSAL, CONVERTED, Model(block_size=1), Model(block_size=12)]),
    st.dictionaries(st.sampled_from(["strategy", *FIELDS]) | st.text(max_size=8), JSON, max_size=4),
)
def test_any_object_is_resolved_or_refused(model: Model, requested: dict[str, Any]) -> None:
    try:
        params = resolve(model, requested)
    except ParameterError as refusal:
        params, name = None, refusal.param
    if params is None:
        assert name.startswith("diffusion.")
        return
    assert params.strategy in valid_names(model)
    json.dumps(params.values, allow_nan=False)
    assert set(params.values) <= set(strategy_classes()[params.strategy].Params.__struct_fields__)
