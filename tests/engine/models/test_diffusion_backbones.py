"""Backbones of the diffusion families as transformers computes them, where it has one of the same layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from linocut.engine.config import EngineConfig
from linocut.engine.conformance.forward import Probe
from linocut.engine.core import EngineCore
from linocut.engine.errors import ModelError
from linocut.engine.loading import load_model
from linocut.engine.models.backbone import backbone_from_config

VOCAB, LENGTH = 150, 45
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
# Queries grow at position 16 and again at 32.
MINISTRAL = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.6,
    }
}


def checkpoint(folder: Path, model: Any, rename: Callable[[str], str] = str, **fields: Any) -> Any:
    """`model` with weights that all matter, saved under other names and with other fields (None: without)."""
    torch.manual_seed(6)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("norm.weight"):
                tensor.normal_(1.0, 0.3)
            else:
                tensor.normal_(0.0, 0.6 if "embed" in name or "mlp.gate." in name else 0.25)
    model.eval().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return model


def core_of(folder: Path, **settings: Any) -> EngineCore:
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "page_size": 8, "kv_memory": 4 << 20}
    return EngineCore(load_model(EngineConfig(model=str(folder), max_running=4, **defaults | settings)))


def logits(model: Any, ids: list[int], visible: list[int]) -> Tensor:
    """[tokens, vocab], where row q sees the first visible[q] positions."""
    mask = torch.arange(len(ids))[None, :] < torch.tensor(visible)[:, None]
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids]), attention_mask=additive).logits[0]
    assert found.std() > 1, "weights that say nothing prove nothing"
    return found


def some_ids() -> list[int]:
    ids: list[int] = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    return ids


def probed(core: EngineCore, block: int = 1) -> Tensor:
    probe = Probe(core, 20, stranger=True)
    try:
        return probe.run(some_ids(), 0, LENGTH, block)
    finally:
        probe.close()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


def causal() -> list[int]:
    return list(range(1, LENGTH + 1))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": True},
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2], "norm_topk_prob": True},
    ],
    ids=str,
)
def test_qwen3_moe(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE, **fields, attn_implementation="eager"))
    checkpoint(tmp_path, model)
    assert_close(probed(core_of(tmp_path)), logits(model, some_ids(), causal()))


def test_sdar_moe_sees_its_blocks(tmp_path: Path) -> None:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE, norm_topk_prob=True, attn_implementation="eager"))
    checkpoint(tmp_path, model, model_type="sdar_moe", block_size=8, mask_token_id=149)
    visible = [min((place // 8 + 1) * 8, LENGTH) for place in range(LENGTH)]
    assert_close(probed(core_of(tmp_path), block=8), logits(model, some_ids(), visible))


@pytest.mark.parametrize(("moe_layer_freq", "dense"), [([1, 1, 1], []), ([0, 1, 1], [0])])
def test_llada_moe_is_qwen3_moe_that_sees_everything(
    tmp_path: Path, moe_layer_freq: list[int], dense: list[int]
) -> None:
    """As it is published: under LLaDA's model_type, without an intermediate_size."""
    config = Qwen3MoeConfig(**SIZES, **MOE, norm_topk_prob=False, mlp_only_layers=dense, attn_implementation="eager")
    model = checkpoint(
        tmp_path,
        Qwen3MoeForCausalLM(config),
        model_type="llada",
        mask_token_id=149,
        qk_layernorm=True,
        moe_layer_freq=moe_layer_freq,
        num_experts=MOE["num_experts"],
        num_local_experts=None,
        expert_intermediate_size=MOE["moe_intermediate_size"],
        dense_intermediate_size=SIZES["intermediate_size"],
        moe_intermediate_size=None,
        intermediate_size=None,
    )
    core = core_of(tmp_path)
    assert (core.traits.name, core.traits.context) == ("llada", "full")
    assert_close(probed(core), logits(model, some_ids(), [LENGTH] * LENGTH))


def test_nemotron_is_ministral_3_under_other_names(tmp_path: Path) -> None:
    """Its final tokens see what is before them; a block that is being denoised sees all of itself."""

    def renamed(name: str) -> str:
        return "diffusion_head.weight" if name == "lm_head.weight" else name.replace("model.", "encoder.", 1)

    model = Ministral3ForCausalLM(Ministral3Config(**SIZES, **MINISTRAL, attn_implementation="eager"))
    checkpoint(tmp_path, model, renamed, model_type="nemotron_labs_diffusion", block_size=8, mask_token_id=100)
    core = core_of(tmp_path)
    want = logits(model, some_ids(), causal())
    assert_close(probed(core), want)
    plain = checkpoint(tmp_path / "plain", Ministral3ForCausalLM(Ministral3Config(**SIZES, **MINISTRAL)))
    plain.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    assert not torch.allclose(logits(plain, some_ids(), causal())[20:], want[20:], atol=1e-2), "queries do not grow"


@pytest.mark.parametrize("strategy", ["autoregressive", "verify", "threshold", "static"])
def test_a_shape_of_nemotron_generates_with_random_weights(tmp_path: Path, strategy: str) -> None:
    from linocut.engine.conformance.trace import greedy_request, trace_one
    from linocut.engine.params import DecodingParams

    config = {**SIZES, **MINISTRAL, "model_type": "nemotron_labs_diffusion", "block_size": 8, "mask_token_id": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    core = core_of(tmp_path, random_weights=True, strategy=strategy, check_invariants=True)
    decoding = DecodingParams(strategy=core.info.default_strategy, values=core.info.default_parameters)
    trace = trace_one(core, greedy_request("a", some_ids()[:13], 20, decoding, ignore_eos=True))
    assert len(trace.tokens) == 20
    assert 100 not in trace.tokens


def test_random_weights_serve_every_layout(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "golden"
    for family in ("sdar_moe", "llada2", "llada", "dream", "wedlm", "wedlm_bias"):
        (tmp_path / "config.json").write_text((golden / family / "config.json").read_text())
        core = core_of(tmp_path, random_weights=True, mask_id=311)
        assert probed(core, core.traits.block_size).isfinite().all(), family


# ---------------------------------------------------------------------- details of the config.json

LLADA2 = {
    **SIZES,
    "model_type": "llada2_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 2,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
}
LLADA = {
    "model_type": "llada",
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 6,
    "mlp_hidden_size": 80,
    "vocab_size": VOCAB,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score_function": "tanh"}, "score_function 'tanh'"),
        ({"n_group": 3}, "n_group 3"),
        ({"topk_group": 5}, "topk_group 5"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok 17"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"moe_intermediate_size": "wide"}, "no number"),
        ({"expert_capacity": 3}, "expert_capacity 3"),
        ({"expert_capacity": 17}, "expert_capacity 17"),
        ({"use_sliding_window": True}, "sliding"),
    ],
    ids=str,
)
def test_what_llada2_does_not_have_is_refused(fields: dict[str, Any], message: str) -> None:
    config = {**LLADA2, "sliding_window": 64, **fields}
    with pytest.raises(ModelError, match=message):
        backbone_from_config({name: value for name, value in config.items() if value is not None})


def test_a_capacity_takes_the_place_of_groups() -> None:
    experts = backbone_from_config({**LLADA2, "expert_capacity": 6, "block_size": 16, "topk_group": 5}).experts
    assert experts is not None
    assert (experts.capacity, experts.block, experts.groups) == (6, 16, 1)
    published = backbone_from_config({**LLADA2, "expert_capacity": 6}).experts
    assert published is not None
    assert published.block == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_type": "sequential"}, "block_type"),
        ({"layer_norm_type": "low_precision"}, "layer_norm_type"),
        ({"block_group_size": 4}, "block_group_size"),
        ({"alibi": True}, "alibi"),
        ({"rope": False}, "rope"),
        ({"activation_type": "gelu"}, "activation_type"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"scale_logits": True}, "scale_logits"),
        ({"attention_layer_norm": True}, "attention_layer_norm"),
        ({"include_bias": True}, "include_bias"),
        ({"multi_query_attention": True}, "multi_query_attention"),
        ({"d_model": None}, "d_model"),
    ],
    ids=str,
)
def test_what_llada_does_not_have_is_refused(fields: dict[str, Any], message: str) -> None:
    config = {**LLADA, **fields}
    with pytest.raises(ModelError, match=message):
        backbone_from_config({name: value for name, value in config.items() if value is not None})


def test_llada_rotates_in_float32_unless_it_says_otherwise() -> None:
    assert backbone_from_config(LLADA).rope_float32
    assert not backbone_from_config({**LLADA, "rope_full_precision": False}).rope_float32
    assert not backbone_from_config(LLADA2).rope_float32


@pytest.mark.parametrize(
    ("config", "details"),
    [
        ({"model_type": "wedlm", "attention_bias": True}, (True, False, False)),
        ({"model_type": "wedlm", "attention_bias": False}, (False, False, True)),
        ({"model_type": "Dream"}, (True, False, False)),
        ({"model_type": "sdar_moe", **MOE}, (False, False, True)),
        (LLADA2, (False, False, True)),
        ({**LLADA2, "use_qkv_bias": True, "use_bias": True, "use_qk_norm": False}, (True, True, False)),
        ({"model_type": "nemotron_labs_diffusion"}, (False, False, False)),
    ],
    ids=lambda value: str(value.get("model_type")) if isinstance(value, dict) else "",
)
def test_biases_and_norms_belong_to_the_architecture(config: dict[str, Any], details: tuple[bool, bool, bool]) -> None:
    backbone = backbone_from_config({**SIZES, **config})
    assert (backbone.qkv_bias, backbone.o_bias, backbone.qk_norm) == details


def test_weights_that_a_token_reads_are_those_of_its_experts() -> None:
    backbone = backbone_from_config(LLADA2)
    attention = 48 * (6 + 4) * 16 + 96 * 48
    dense, sparse = 3 * 48 * 80, 3 * 48 * (4 + 2) * 24
    assert backbone.parameters == 3 * attention + dense + 2 * sparse + VOCAB * 48
