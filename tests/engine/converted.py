"""Converted folders as `linocut convert` writes them, made from a tiny golden checkpoint with random adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_engines import GOLDEN

MASK = 311
RANK = 4


def converted_folder(
    target: Path,
    *,
    block_size: int = 4,
    logit_source: str = "previous",
    context: str = "token-causal",
    gated: bool = True,
    draft_head: float | None = None,
    **own: Any,
) -> Path:
    """The golden AR checkpoint with a `linocut` object, and a random adapter that changes what masks say.

    draft_head: the size of its weights; 0 makes one that changes nothing, None has none.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in (GOLDEN / "jacobi_qwen2").iterdir():
        if path.name in ("config.json", "model.safetensors"):
            shutil.copy(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    config["linocut"] = {
        "context": context,
        "logit_source": logit_source,
        "block_size": block_size,
        "mask_token_id": MASK,
        **({"adapter": {"rank": RANK, "gate": "noisy"}} if gated else {}),
        **own,
    }
    (target / "config.json").write_text(json.dumps(config))
    if gated:
        tensors = random_adapter(config)
        if draft_head is not None:
            generator, hidden = torch.Generator().manual_seed(5), config["hidden_size"]
            tensors["draft_head.input"] = torch.randn(hidden, 2 * hidden, generator=generator) * draft_head
            tensors["draft_head.output"] = torch.randn(hidden, hidden, generator=generator) * draft_head
        save_file(tensors, target / "adapter.safetensors")
    return target


def random_adapter(config: dict[str, Any], scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Tensors by name for every packed projection, and a mask embedding; values are float16's."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half().float()

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    shapes = {
        "self_attn.qkv_proj": (hidden, q + 2 * kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_up_proj": (hidden, 2 * inner),
        "mlp.down_proj": (inner, hidden),
    }
    tensors = {"model.mask_embedding": draw(hidden) * 0.1}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            tensors[f"model.layers.{layer}.{name}.adapter.down"] = draw(RANK, inputs)
            tensors[f"model.layers.{layer}.{name}.adapter.up"] = draw(outputs, RANK)
    return tensors
