"""What the engine makes of a canvas model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from canvas_engines import answer, canvas_core, request, run
from plain_canvas import END, MASK, SIZES, VOCAB, write_canvas
from safetensors.torch import load_file, save_file

from linocut.engine.canvas.loading import load_canvas
from linocut.engine.canvas.shape import canvas_from_config, is_canvas
from linocut.engine.config import EngineConfig
from linocut.engine.decoding.parameters import resolve
from linocut.engine.errors import ConfigError, ModelError, ParameterError


def config_of(folder: Path, **fields: Any) -> EngineConfig:
    return EngineConfig(**{"model": str(folder), "device": "cpu", **fields})


def test_the_layouts_of_config_and_weights_are_one_model(tmp_path: Path) -> None:
    texts = []
    for layout in ("didi", "didi-flat", "mdlm"):
        write_canvas(tmp_path / layout, layout=layout, reward=layout == "didi")
        core = canvas_core(tmp_path / layout)
        asked = request(core, "r", [65], diffusion={"strategy": "ancestral", "steps": 4})
        texts.append(answer(run(core, asked)["r", 0]))
    assert texts[0] == texts[1] == texts[2]


def test_what_the_server_learns_of_it(tmp_path: Path) -> None:
    write_canvas(tmp_path)
    info = load_canvas(config_of(tmp_path)).info
    assert (info.family, info.context, info.block_size) == ("canvas", "canvas", SIZES["length"])
    assert info.max_model_len == SIZES["length"] - 1  # the begin id has a position
    assert (info.mask_id, info.stop_ids, info.vocab_size) == (MASK, (END,), VOCAB)
    assert (info.pages, info.prefix_caching, info.dtype) == (0, False, "float32")
    assert info.strategies == ("guided", "ancestral")
    assert info.default_parameters["steps"] == 16


def test_without_a_discriminator_there_is_no_guidance(tmp_path: Path) -> None:
    write_canvas(tmp_path, reward=False)
    info = load_canvas(config_of(tmp_path)).info
    assert info.strategies == ("ancestral",)
    with pytest.raises(ParameterError) as refused:
        resolve(info, {"strategy": "guided"})
    assert refused.value.param == "diffusion.strategy"
    with pytest.raises(ConfigError, match="strategy"):
        load_canvas(config_of(tmp_path, strategy="guided"))


def test_the_operators_defaults(tmp_path: Path) -> None:
    write_canvas(tmp_path)
    info = load_canvas(config_of(tmp_path, strategy="ancestral", strategy_parameters={"steps": 32})).info
    assert (info.default_strategy, info.default_parameters) == ("ancestral", {"steps": 32})
    with pytest.raises(ConfigError, match="steps"):
        load_canvas(config_of(tmp_path, strategy_parameters={"steps": 0}))


def test_ends_of_gpt2_are_known_and_others_can_be_named() -> None:
    sizes = {"model_type": "mdlm", "hidden_dim": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12}
    gpt2 = canvas_from_config({**sizes, "vocab_size": 50258, "model_length": 1024})
    assert (gpt2.mask_id, gpt2.begin_id, gpt2.stop_ids, gpt2.max_model_len) == (50257, 50256, (50256,), 1023)
    other = canvas_from_config({**sizes, "vocab_size": 30522, "model_length": 128, "mask_token_id": 103})
    assert (other.mask_id, other.begin_id, other.stop_ids, other.max_model_len) == (103, None, (), 128)
    named = canvas_from_config({**sizes, "vocab_size": 30522, "model_length": 128}, mask_id=103, stop_ids=(102,))
    assert (named.mask_id, named.stop_ids) == (103, (102,))


def test_generation_config_says_how_texts_end(tmp_path: Path) -> None:
    write_canvas(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "temperature": 0.9}))
    info = load_canvas(config_of(tmp_path)).info
    assert info.stop_ids == (7, 8)
    assert info.default_sampling == {"temperature": 0.9}


def test_time_conditioning_is_honoured(tmp_path: Path) -> None:
    texts = []
    for told in (False, True):
        write_canvas(tmp_path / str(told), time_conditioning=told)
        core = canvas_core(tmp_path / str(told))
        asked = request(core, "r", [65], diffusion={"strategy": "ancestral", "steps": 4})
        texts.append(answer(run(core, asked)["r", 0]))
    assert texts[0] != texts[1]


def test_other_models_are_not_taken_for_it() -> None:
    assert not is_canvas({"model_type": "llama", "hidden_size": 32})
    assert not is_canvas({"model": "a name", "config": ["what"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "heads"),
        ({"length": 2}, "no text"),
        ({"n_blocks": None}, "n_blocks"),
        ({"cond_dim": "wide"}, "cond_dim"),
        ({"causal_attention": True}, "causal"),
        ({"parameterization": "d3pm"}, "d3pm"),
        ({"eos_token_id": VOCAB}, "not in the vocabulary"),
        ({"hidden_size": 64}, "has shape"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_canvas(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load_canvas(config_of(tmp_path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_canvas(tmp_path)
    path = tmp_path / "discriminator.safetensors"
    tensors = load_file(str(path))
    del tensors["output_layer.main.0.bias"]
    save_file(tensors, str(path))
    with pytest.raises(ModelError, match=r"output_layer\.main\.0\.bias"):
        load_canvas(config_of(tmp_path))


def test_a_discriminator_with_plain_layers_is_read(tmp_path: Path) -> None:
    _, judge = write_canvas(tmp_path)
    path = tmp_path / "discriminator.safetensors"
    tensors = load_file(str(path))
    for index in (0, 2):
        layer = judge.output_layer.main[index]
        for part in ("weight_orig", "weight_u", "weight_v"):
            del tensors[f"output_layer.main.{index}.{part}"]
        tensors[f"output_layer.main.{index}.weight"] = layer.weight.detach().clone()
    reward = load_canvas(config_of(tmp_path)).reward
    save_file(tensors, str(path))
    plain = load_canvas(config_of(tmp_path)).reward
    assert reward is not None
    assert plain is not None
    tokens = torch.arange(SIZES["length"])[None]
    torch.testing.assert_close(plain.rewards(tokens, torch.ones(1)), reward.rewards(tokens, torch.ones(1)))


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization": "int8"},
        {"attention": "triton"},
        {"numerics": "reference"},
        {"block_size": 4},
        {"kv_memory": 1 << 20},
        {"max_model_len": SIZES["length"]},
        {"token_budget": SIZES["length"] - 1},
    ],
    ids=str,
)
def test_settings_of_the_other_lane_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_canvas(tmp_path)
    with pytest.raises(ConfigError, match=next(iter(fields))):
        load_canvas(config_of(tmp_path, **fields))
