"""Importing a GGUF file: weights, configuration, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_gguf import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, Q8_0, VOCAB, tiny_weights, write_gguf

from linocut.engine.errors import ModelError
from linocut.engine.models import gguf_import


def convert(tmp_path: Path, dtype: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    reader = gguf_import.open_gguf(tmp_path / "tiny.gguf")
    config = gguf_import.read_config(reader)
    gguf_import.write_safetensors(reader, config, tmp_path / "model.safetensors", dtype)
    return config, load_file(tmp_path / "model.safetensors")


def test_weights_arrive_under_their_names_in_their_order(tmp_path: Path) -> None:
    _, found = convert(tmp_path, "float32")
    expected = tiny_weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if weight.ndim == 2 and "v_proj" not in name:
            weight = gguf.dequantize(gguf.quantize(weight, Q8_0), Q8_0)
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_float16_is_the_nearest(tmp_path: Path) -> None:
    _, exact = convert(tmp_path, "float32")
    _, half = convert(tmp_path, "float16")
    assert all(np.array_equal(half[name], weight.astype(np.float16)) for name, weight in exact.items())


def test_the_configuration_is_llamas(tmp_path: Path) -> None:
    config, _ = convert(tmp_path, "float32")
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == 10000.0
    assert config["rms_norm_eps"] == 1e-5
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")
    assert [config[size] for size in sizes] == [HIDDEN, HEADS, KV_HEADS, FFN, LAYERS]
    assert (config["vocab_size"], config["head_dim"], config["max_position_embeddings"]) == (VOCAB, HEAD_DIM, 128)


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    weights = tiny_weights()
    head = weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    write_gguf(tmp_path / "tiny.gguf", weights)
    reader = gguf_import.open_gguf(tmp_path / "tiny.gguf")
    config = gguf_import.read_config(reader)
    assert config["tie_word_embeddings"] is False
    found = gguf_import.read_weight("lm_head.weight", gguf_import.name_weights(reader)["lm_head.weight"], config)
    np.testing.assert_array_equal(found, gguf.dequantize(gguf.quantize(head, Q8_0), Q8_0))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", {}, architecture="qwen2")
    with pytest.raises(ModelError, match="architecture 'qwen2'; only 'llama'"):
        gguf_import.open_gguf(tmp_path / "tiny.gguf")


def test_a_foreign_tensor_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", {"blk.0.ffn_gate_exps.weight": np.zeros(2, np.float32)})
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_gate_exps\.weight does not belong to a Llama"):
        gguf_import.name_weights(gguf_import.open_gguf(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("kept", [0, 3, 100, 5000])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_weights())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"tiny\.gguf is not a readable GGUF file"):
        gguf_import.open_gguf(path)
