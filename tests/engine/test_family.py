"""A checkpoint's config.json says which family it is of, and the traits say everything else."""

from __future__ import annotations

from typing import Any

import pytest

from linocut.engine.errors import ModelError
from linocut.engine.family import FamilyTraits, LogitSource, family_from_config


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


def test_sdar_moe_is_sdar() -> None:
    assert family_from_config(config("sdar_moe", block_size=8)) == family_from_config(config("sdar", block_size=8))


def test_llada2_has_blocks_of_32_and_rounds_its_norms_as_llama_does() -> None:
    traits = family_from_config(config("llada2_moe", eos_token_id=156892))
    assert traits == FamilyTraits("llada2", "block-causal", "own", 32, 32, 156895, (156892,))


@pytest.mark.parametrize(
    ("model_type", "name", "source", "mask"),
    [("llada", "llada", "own", 126336), ("lladamoe", "llada", "own", 156895), ("Dream", "dream", "previous", 151666)],
)
def test_models_that_see_everything_have_blocks_from_the_prompts_end(
    model_type: str, name: str, source: LogitSource, mask: int
) -> None:
    assert family_from_config(config(model_type)) == FamilyTraits(name, "full", source, 32, 32, mask, (), grid="prompt")


def test_wedlm_feeds_its_masks_causally() -> None:
    traits = family_from_config(config("wedlm", mask_token_id=None))
    assert traits == FamilyTraits("wedlm", "token-causal", "own", 1, 1, 151665, (), in_block="causal")
    assert traits.overhang > 1
    with pytest.raises(ModelError, match="block_size"):
        family_from_config(config("wedlm"), block_size=16)


def test_nemotron_denoises_blocks_behind_the_prompt_over_an_autoregressive_past() -> None:
    traits = family_from_config(config("nemotron_labs_diffusion", block_size=32))
    want = FamilyTraits(
        "nemotron_labs_diffusion", "token-causal", "own", 32, 32, 100, (), grid="prompt", commits_blocks=True
    )
    assert traits == want
    assert traits.commit_seeds
    assert not traits.commit_opens


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["StableDiffCoderForCausalLM"]},
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.StableDiffcoderForCausalLM"}},
    ],
)
def test_stable_diffcoder_is_told_from_llama_by_its_classes(fields: dict[str, Any]) -> None:
    traits = family_from_config(config("llama", **fields))
    assert traits == FamilyTraits("stable_diffcoder", "block-causal", "own", 4, 4, 5, ())
    assert family_from_config(config("llama", architectures=["LlamaForCausalLM"])).name == "ar"


def test_llada_moe_is_told_from_llada_by_its_experts() -> None:
    """Published under LLaDA's model_type, with a mask id of its own."""
    assert family_from_config(config("llada", num_experts=64)).mask_id == 156895
    assert family_from_config(config("llada")).mask_id == 126336


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_plain_backbones_are_autoregressive(model_type: str) -> None:
    traits = family_from_config(config(model_type, eos_token_id=[1, 2]))
    assert traits == FamilyTraits("ar", "token-causal", "previous", 1, 1, None, (1, 2))
    assert family_from_config(config(model_type), block_size=1).block_size == 1


@pytest.mark.parametrize("model_type", ["gpt2", "deepseek_v3", "", None])
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
