"""Shapes of published checkpoints, for benchmarks with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN25_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}

SHAPES: dict[str, dict[str, Any]] = {
    "fast-dllm-v2-7b": {**_QWEN25_7B, "model_type": "Fast_dLLM_Qwen", "bd_size": 32, "mask_token_id": 151665},
    "qwen2.5-7b": {**_QWEN25_7B, "model_type": "qwen2"},
    "sdar-8b": {
        "model_type": "sdar",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151643,
        "mask_token_id": 151669,
        "block_size": 4,
    },
}


def write_shape(name: str, folder: Path) -> Path:
    """A folder with nothing but the config.json of a shape, to be loaded with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return folder
