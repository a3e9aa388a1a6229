"""A tiny LLaDA-MoE with random weights, and the same network as transformers computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_engines import engine
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from linocut.engine.core import EngineCore

MASK = 299
CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
    "eos_token_id": 2,
}


def llada_moe(folder: Path) -> Any:
    """Save the checkpoint to `folder` and return the network."""
    torch.manual_seed(6)
    network = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if not name.endswith("norm.weight"):
                tensor.normal_(0.0, 0.6 if "embed" in name or "mlp.gate." in name else 0.25)
    network.save_pretrained(folder)
    own = {"model_type": "lladamoe", "architectures": ["LLaDAMoEModelLM"], "mask_token_id": MASK, "qk_layernorm": True}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))
    return network


def core_of(folder: Path, **settings: Any) -> EngineCore:
    return engine("llada", model=str(folder), mask_id=MASK, **settings)
