"""Tiny models and documents for the tests of the training core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from linocut.training.documents import Documents
from linocut.training.settings import AdaptSettings

VOCAB, MASK = 256, 255
LENGTHS, PROMPTS = [30, 17, 40, 9, 22, 50, 12, 60] * 4, [10, 3, 20, 4, 2, 30, 5, 12] * 4
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def save_model(folder: Path, kind: str = "llama", **changes: Any) -> Any:
    """Save a random model of two layers in Hugging Face's layout and return it."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(_CONFIGS[kind](**(shape | changes))).float().eval()
    for parameter in model.parameters():  # biases and norms too, or they would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def make_documents(lengths: list[int], prompts: list[int], seed: int = 0) -> Documents:
    """Random tokens below the mask id."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths)
    tokens = torch.randint(3, MASK, (int(sizes.sum()),), generator=generator, dtype=torch.int32)
    return Documents(tokens, sizes.cumsum(0) - sizes, sizes, torch.tensor(prompts))


def save_documents(documents: Documents, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "tokens": documents.tokens,
        "lengths": documents.lengths.int(),
        "prompt_lengths": documents.prompt_lengths.int(),
    }
    save_file(parts, folder / "shard-00000.safetensors", metadata={"model": "tiny"})
    return folder


def make_folder(folder: Path) -> Path:
    """Save a model in folder/base and answers in folder/answers, where `make_settings` looks."""
    save_model(folder / "base")
    save_documents(make_documents(LENGTHS, PROMPTS), folder / "answers")
    return folder


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def make_settings(folder: Path, **changes: Any) -> AdaptSettings:
    """Settings for a model in folder/base and answers in folder/answers; float32 on the CPU."""
    values: dict[str, Any] = {
        "base": str(folder / "base"),
        "data": [str(folder / "answers")],
        "run": str(folder / "run"),
        "output": str(folder / "converted"),
        "mask_token_id": MASK,
        "rank": 8,
        "length": 64,
        "rows": 2,
        "held_out": 4,
        "max_steps": 4,
        "log_every": 1,
        "device": "cpu",
    }
    return AdaptSettings(**(values | changes))
