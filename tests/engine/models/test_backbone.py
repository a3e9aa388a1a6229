"""Llama, Qwen2 and Qwen3 as transformers computes them, in every variant of their config.json that is supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from linocut.engine.config import EngineConfig
from linocut.engine.conformance.forward import Probe
from linocut.engine.core import EngineCore
from linocut.engine.errors import LinocutError, ModelError
from linocut.engine.loading import load_model
from linocut.engine.models.backbone import backbone_from_config

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 150,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def checkpoint(folder: Path, kind: str, shards: str = "1GB", **fields: Any) -> Any:
    """A random model of `kind`, saved to `folder`; every tensor matters, biases and norms too."""
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(len(str(fields)))
    model = model_class(config_class(**{**SIZES, **fields}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("norm.weight"):
                tensor.normal_(1.0, 0.3)
            elif tensor.dim() == 1:
                tensor.normal_(0.0, 0.5)
            else:
                tensor.normal_(0.0, 0.6 if "embed" in name else 0.25)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def edit_config(folder: Path, **fields: Any) -> None:
    """Change config.json; None removes a field."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def core_of(folder: Path, **overrides: Any) -> EngineCore:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "page_size": 8,
        "kv_memory": 4 << 20,
        "max_running": 4,
    }
    return EngineCore(load_model(EngineConfig(model=str(folder), **settings | overrides)))


def assert_same_logits(core: EngineCore, model: Any, length: int = 61) -> None:
    ids = torch.randint(0, 150, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    probe = Probe(core, 20, stranger=True)
    got = probe.run(ids, 0, length, 1)
    probe.close()
    assert want.std() > 1, "weights that say nothing prove nothing"
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    # Every position's own row, and the cache: the second half on top of the first half's K/V.
    probe = Probe(core, 20, stranger=False)
    probe.run(ids[:30], 0, 30, 1)
    torch.testing.assert_close(probe.run(ids[30:], 30, length, 1), want[30:], atol=3e-4, rtol=1e-4)
    probe.close()


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 20}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ("llama", {"rope_parameters": {**YARN, "rope_theta": 10000.0}}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
]
# Query heads that share a key head: 1, 3, 4 and 7.
GROUPS = [
    (kind, {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads, "head_dim": 8})
    for kind in CLASSES
    for heads, kv_heads in ((3, 3), (6, 2), (8, 2), (7, 1))
]


@pytest.mark.parametrize(("kind", "fields"), VARIANTS + GROUPS, ids=str)
def test_logits_are_those_of_transformers(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    model = checkpoint(tmp_path, kind, **fields)
    assert_same_logits(core_of(tmp_path), model)


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "linear", "factor": 4.0}], ids=str)
def test_the_older_spelling_of_rope_means_the_same(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    """`rope_theta` and `rope_scaling` (with `type`), as transformers 4 wrote them."""
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": 50000.0}
    parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    model = checkpoint(tmp_path, "llama", rope_parameters=parameters)
    edit_config(tmp_path, rope_parameters=None, rope_theta=50000.0, rope_scaling=scaling)
    assert_same_logits(core_of(tmp_path), model)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_checkpoint_in_shards_is_read_whole(tmp_path: Path, kind: str) -> None:
    model = checkpoint(tmp_path, kind, shards="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(core_of(tmp_path), model)


@pytest.mark.parametrize(("model_type", "kind"), [("sdar", "qwen3"), ("Fast_dLLM_Qwen", "qwen2")])
def test_diffusion_families_are_their_backbones(tmp_path: Path, model_type: str, kind: str) -> None:
    model = checkpoint(tmp_path, kind)
    edit_config(tmp_path, model_type=model_type, mask_token_id=149, block_size=1, bd_size=1)
    assert_same_logits(core_of(tmp_path), model)


def test_a_head_that_the_checkpoint_lacks_is_the_embedding(tmp_path: Path) -> None:
    """Tied checkpoints hold the matrix once, whatever else they hold."""
    model = checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_logits(core_of(tmp_path), model)


# ---------------------------------------------------------------------- what is not supported is refused, by name

PLAIN = {"model_type": "qwen2", **SIZES}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_what_is_not_supported_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        backbone_from_config(PLAIN | fields)


@pytest.mark.parametrize(
    "name", ["num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"]
)
def test_a_missing_size_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        backbone_from_config({key: value for key, value in PLAIN.items() if key != name})


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"num_attention_heads": 6, "num_key_value_heads": 4},
        {"head_dim": 7},
        {"hidden_size": "wide"},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_a_model_error_at_start(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Not an exception of whatever library met it first, and not at the first request."""
    checkpoint(tmp_path, "llama")
    edit_config(tmp_path, rope_parameters=None, **fields)
    with pytest.raises(LinocutError):
        core_of(tmp_path, random_weights=True)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"num_key_value_heads": None}, {"kv_heads": 6}),
        ({"head_dim": None}, {"head_dim": 8}),
        ({"head_dim": 20}, {"head_dim": 20}),
        ({"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
        ({"rope_theta": None}, {"rope_theta": 10000.0, "rope_scaling": None}),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0, "rope_scaling": None}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"max_positions": 128}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"partial_rotary_factor": 0.5}, {"rotary_dim": 4}),
        ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}}, {"rotary_dim": 4}),
        ({"partial_rotary_factor": 1.0}, {"rotary_dim": None}),
    ],
    ids=str,
)
def test_fields_and_their_defaults(fields: dict[str, Any], wanted: dict[str, Any]) -> None:
    backbone = backbone_from_config(PLAIN | fields)
    assert {name: getattr(backbone, name) for name in wanted} == wanted


def test_biases_and_norms_belong_to_the_architecture() -> None:
    def details(**fields: Any) -> tuple[bool, bool, bool, bool]:
        b = backbone_from_config(PLAIN | fields)
        return b.qkv_bias, b.o_bias, b.mlp_bias, b.qk_norm

    assert details(model_type="qwen2") == (True, False, False, False)
    assert details(model_type="qwen3") == (False, False, False, True)
    assert details(model_type="qwen3", attention_bias=True) == (True, True, False, True)
    assert details(model_type="llama") == (False, False, False, False)
    assert details(model_type="llama", attention_bias=True, mlp_bias=True) == (True, True, True, False)


def test_sizes_follow_from_the_shape() -> None:
    backbone = backbone_from_config(PLAIN)
    assert backbone.kv_bytes_per_position(2) == 2 * 2 * 2 * 8 * 2
    layer = 48 * (6 + 4) * 8 + 48 * 48 + 3 * 48 * 80
    assert backbone.parameters == 2 * layer + 150 * 48
