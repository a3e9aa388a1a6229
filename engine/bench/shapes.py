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

# A Qwen2.5-7B as `linocut convert` writes it, with a gated adapter of the size of I-DLM's (arXiv 2604.11035).
_CONVERTED = {
    "context": "token-causal",
    "logit_source": "previous",
    "block_size": 4,
    "mask_token_id": 151665,
    "adapter": {"rank": 128, "gate": "noisy"},
}

SHAPES: dict[str, dict[str, Any]] = {
    "fast-dllm-v2-7b": {**_QWEN25_7B, "model_type": "Fast_dLLM_Qwen", "bd_size": 32, "mask_token_id": 151665},
    "qwen2.5-7b": {**_QWEN25_7B, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "converted-7b": {**_QWEN25_7B, "model_type": "qwen2", "linocut": _CONVERTED},
    # No published SDAR has this size: it stands beside the others of 7B.
    "sdar-7b": {**_QWEN25_7B, "model_type": "sdar", "mask_token_id": 151669, "block_size": 4},
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
    "smollm2-135m": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    },
}


# Of the same kind, and small enough for a CPU.
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "torch_dtype": "float32",
}


def write_shape(name: str, folder: Path, tiny: bool = False) -> Path:
    """A folder with nothing but the config.json of a shape, to be loaded with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | (TINY if tiny else {})))
    return folder
