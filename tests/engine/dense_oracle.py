"""What the checkpoints compute according to transformers: dense, without a cache, one sequence at a time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

_CLASSES = {"sdar": (Qwen3Config, Qwen3ForCausalLM), "fast_dllm_qwen": (Qwen2Config, Qwen2ForCausalLM)}
_CLASSES["qwen2"] = _CLASSES["fast_dllm_qwen"]


@cache
def dense_model(folder: Path) -> Any:
    """The checkpoint under the transformers class of its backbone, in float32."""
    fields = json.loads((folder / "config.json").read_text())
    config_class, model_class = _CLASSES[fields["model_type"].lower()]
    kept = {k: v for k, v in fields.items() if k not in ("model_type", "auto_map", "architectures", "torch_dtype")}
    model = model_class(config_class(**kept, attn_implementation="eager")).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@torch.no_grad()
def dense_forward(folder: Path, ids: list[int], block_size: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits [len, vocab] and per layer K and V ([len, kv_heads, head_dim], keys rotated) of ids at positions 0 ...

    Position q sees every position before the end of its block; block size 1 is causal.
    """
    block = torch.arange(len(ids)) // block_size
    hidden = torch.where(block[:, None] >= block[None, :], 0.0, torch.finfo(torch.float32).min)
    out = dense_model(folder)(input_ids=torch.tensor([ids]), attention_mask=hidden[None, None], use_cache=True)
    layers = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in out.past_key_values.layers]
    return out.logits[0], layers
