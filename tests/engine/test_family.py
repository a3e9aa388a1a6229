"""A checkpoint's config.json says which family it is of, and the traits say everything else."""

from __future__ import annotations

from typing import Any

import pytest

from linocut.engine.errors import ModelError
from linocut.engine.family import FamilyTraits, family_from_config


def config(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "vocab_size": 200_000, **fields}


def test_fast_dllm_v2_is_shifted_and_refines_sub_blocks() -> None:
    traits = family_from_config(config("Fast_dLLM_Qwen", bd_size=32, eos_token_id=151645))
    assert traits == FamilyTraits("fast_dllm_v2", "block-causal", "previous", 32, 8, 151665, (151645,))
    assert traits.commit_seeds


def test_sdar_predicts_in_place_and_rounds_its_norms_once() -> None:
    traits = family_from_config(config("sdar", block_size=4, mask_token_id=151669, eos_token_id=151645))
    assert traits == FamilyTraits("sdar", "block-causal", "own", 4, 4, 151669, (151645,), fused_norm=True)
    assert not traits.commit_seeds


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_plain_backbones_are_autoregressive(model_type: str) -> None:
    traits = family_from_config(config(model_type, eos_token_id=[1, 2]))
    assert traits == FamilyTraits("ar", "token-causal", "previous", 1, 1, None, (1, 2))
    assert family_from_config(config(model_type), block_size=1).block_size == 1


@pytest.mark.parametrize("model_type", ["gpt2", "llada", "", None])
def test_an_unknown_model_type_is_named_with_those_that_are_known(model_type: str | None) -> None:
    with pytest.raises(ModelError, match="not supported") as error:
        family_from_config({"model_type": model_type, "vocab_size": 9})
    assert "sdar" in str(error.value)
    with pytest.raises(ModelError):
        family_from_config({"vocab_size": 9})


def test_a_block_size_does_not_apply_to_autoregressive_models() -> None:
    with pytest.raises(ModelError, match="block_size 4"):
        family_from_config(config("llama"), block_size=4)


@pytest.mark.parametrize(("model_type", "field"), [("Fast_dLLM_Qwen", "bd_size"), ("sdar", "block_size")])
def test_the_operators_block_size_and_mask_id_replace_the_checkpoints(model_type: str, field: str) -> None:
    fields = config(model_type, **{field: 32}, mask_token_id=7)
    assert (family_from_config(fields).block_size, family_from_config(fields).mask_id) == (32, 7)
    traits = family_from_config(fields, block_size=16, mask_id=9)
    assert (traits.block_size, traits.mask_id) == (16, 9)
    assert family_from_config(fields, mask_id=0).mask_id == 0


@pytest.mark.parametrize("block_size", [1, 4, 8, 12, 16, 20, 32])
def test_the_default_sub_blocks_divide_the_block(block_size: int) -> None:
    traits = family_from_config(config("Fast_dLLM_Qwen"), block_size=block_size)
    assert 1 <= traits.sub_block_size <= 8
    assert block_size % traits.sub_block_size == 0


@pytest.mark.parametrize("fields", [{"mask_token_id": 311}, {"mask_id": 311}, {"mask_token_id": None, "mask_id": 311}])
def test_the_mask_id_is_the_checkpoints_under_either_name(fields: dict[str, Any]) -> None:
    assert family_from_config(config("sdar", **fields)).mask_id == 311


@pytest.mark.parametrize("mask_id", [-1, 320, 151669])
def test_a_mask_id_outside_the_vocabulary_is_refused(mask_id: int) -> None:
    with pytest.raises(ModelError, match=f"mask id {mask_id}"):
        family_from_config({"model_type": "sdar", "vocab_size": 320, "mask_token_id": mask_id})


def test_a_small_vocabulary_without_a_named_mask_is_refused_rather_than_guessed() -> None:
    with pytest.raises(ModelError, match="151669"):
        family_from_config({"model_type": "sdar", "vocab_size": 320})


@pytest.mark.parametrize(
    ("model", "generation", "stops"),
    [
        (None, None, ()),
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (5, 7, (7, 5)),
        (5, [7, 5], (7, 5)),
        (None, [7], (7,)),
    ],
)
def test_stop_ids_are_those_of_both_files_once_each(model: Any, generation: Any, stops: tuple[int, ...]) -> None:
    fields = config("qwen2") if model is None else config("qwen2", eos_token_id=model)
    traits = family_from_config(fields, None if generation is None else {"eos_token_id": generation})
    assert traits.stop_ids == stops


def test_our_converters_name_ids_that_are_never_chosen() -> None:
    assert family_from_config(config("llama", linocut={"banned_ids": [3, 4]})).banned_ids == (3, 4)
    assert family_from_config(config("llama", linocut=None)).banned_ids == ()
