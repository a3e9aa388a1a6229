"""A tiny LLaDA2.2 with random weights, and its network written down from the published description, in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu

BLOCK, VOCAB, MASK, DELETE, SPLIT = 8, 320, 311, 312, 313
HEADS, KV_HEADS, HEAD, ROTARY, HIDDEN = 4, 2, 16, 8, 64
# What random weights say most, so that edits are among it.
SAID = [*range(20, 32), DELETE, SPLIT]
CONFIG: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 3000000,
    "partial_rotary_factor": 0.5,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    # Still there, and without effect.
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "block_size": BLOCK,
    "expert_capacity": 5,
    "mask_token_id": MASK,
    "delete_token_id": DELETE,
    "split_token_id": SPLIT,
}


def llada22(folder: Path) -> Llada22:
    """Save the checkpoint to `folder` and return the network."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape: int, scale: float, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=generator)

    tensors = {
        "model.word_embeddings.weight": random(VOCAB, HIDDEN, scale=0.7),
        "model.norm.weight": random(HIDDEN, scale=0.2, mean=1.0),
        "lm_head.weight": random(VOCAB, HIDDEN, scale=0.15),
    }
    tensors["lm_head.weight"][SAID] *= 3
    for index in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{index}."
        rows = (HEADS + 2 * KV_HEADS) * HEAD
        tensors |= {
            f"{at}input_layernorm.weight": random(HIDDEN, scale=0.2, mean=1.0),
            f"{at}post_attention_layernorm.weight": random(HIDDEN, scale=0.2, mean=1.0),
            f"{at}attention.query_key_value.weight": random(rows, HIDDEN, scale=0.25),
            f"{at}attention.dense.weight": random(HIDDEN, HEADS * HEAD, scale=0.2),
            f"{at}attention.query_layernorm.weight": random(HEAD, scale=0.2, mean=1.0),
            f"{at}attention.key_layernorm.weight": random(HEAD, scale=0.2, mean=1.0),
        }
        sparse = index >= CONFIG["first_k_dense_replace"]
        parts = [f"mlp.experts.{e}." for e in range(CONFIG["num_experts"])] + ["mlp.shared_experts."]
        for part in parts if sparse else ["mlp."]:
            width = CONFIG["moe_intermediate_size"] if sparse else CONFIG["intermediate_size"]
            for name in ("gate_proj", "up_proj"):
                tensors[f"{at}{part}{name}.weight"] = random(width, HIDDEN, scale=0.25)
            tensors[f"{at}{part}down_proj.weight"] = random(HIDDEN, width, scale=0.25)
        if sparse:
            tensors[f"{at}mlp.gate.weight"] = random(CONFIG["num_experts"], HIDDEN, scale=0.4)
            tensors[f"{at}mlp.gate.expert_bias"] = random(CONFIG["num_experts"], scale=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [101, 102]}))
    return Llada22(tensors)


class Llada22:
    """One sequence of whole blocks, all of it at once: the description of LLaDA2's layers, in float64."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        # Of the last forward, for each layer with experts: by token, the experts that it went to.
        self.routed: list[list[set[int]]] = []

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [len, vocab], and of each layer K and V, [len, kv_heads, head]."""
        assert len(ids) % BLOCK == 0, "experts are chosen for whole blocks"
        self.routed = []
        x, cache = self.tensors["model.word_embeddings.weight"][ids], []
        block = torch.arange(len(ids)) // BLOCK
        hidden = block[:, None] < block[None, :]
        for index in range(CONFIG["num_hidden_layers"]):
            at = f"model.layers.{index}."
            y = self._norm(x, f"{at}input_layernorm")
            qkv = linear(y, self.tensors[f"{at}attention.query_key_value.weight"])
            q, k, v = qkv.split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], dim=1)
            q = self._turn(self._norm(q.view(-1, HEADS, HEAD), f"{at}attention.query_layernorm"))
            k = self._turn(self._norm(k.view(-1, KV_HEADS, HEAD), f"{at}attention.key_layernorm"))
            v = v.view(-1, KV_HEADS, HEAD)
            cache.append((k, v))
            group = HEADS // KV_HEADS
            score = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) / HEAD**0.5
            weight = score.masked_fill(hidden, -torch.inf).softmax(-1)
            seen = torch.einsum("hqk,khd->qhd", weight, v.repeat_interleave(group, 1)).flatten(1)
            x = x + linear(seen, self.tensors[f"{at}attention.dense.weight"])
            y = self._norm(x, f"{at}post_attention_layernorm")
            sparse = index >= CONFIG["first_k_dense_replace"]
            x = x + (self._experts(y, f"{at}mlp.") if sparse else self._mlp(y, f"{at}mlp."))
        return linear(self._norm(x, "model.norm"), self.tensors["lm_head.weight"]), cache

    def _experts(self, x: Tensor, at: str) -> Tensor:
        score = linear(x, self.tensors[f"{at}gate.weight"]).sigmoid()
        rank = score + self.tensors[f"{at}gate.expert_bias"]
        y, chosen = [], []
        for first in range(0, len(x), BLOCK):
            block = range(first, first + BLOCK)
            worth = [max(float(rank[t, e]) for t in block) for e in range(CONFIG["num_experts"])]
            allowed = sorted(range(len(worth)), key=lambda e: -worth[e])[: CONFIG["expert_capacity"]]
            for t in block:
                mine = sorted(allowed, key=lambda e: -float(rank[t, e]))[: CONFIG["num_experts_per_tok"]]
                total = sum(float(score[t, e]) for e in mine) + 1e-20
                parts = [self._mlp(x[t], f"{at}experts.{e}.") * (float(score[t, e]) / total * 2.5) for e in mine]
                y.append(torch.stack(parts).sum(0) + self._mlp(x[t], f"{at}shared_experts."))
                chosen.append(set(mine))
        self.routed.append(chosen)
        return torch.stack(y)

    def _mlp(self, x: Tensor, at: str) -> Tensor:
        up = silu(linear(x, self.tensors[f"{at}gate_proj.weight"])) * linear(x, self.tensors[f"{at}up_proj.weight"])
        return linear(up, self.tensors[f"{at}down_proj.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.tensors[f"{name}.weight"]

    def _turn(self, x: Tensor) -> Tensor:
        """RoPE on the first half of a head, [len, heads, head]."""
        place = torch.arange(len(x), dtype=torch.float64)
        angle = place[:, None] / CONFIG["rope_theta"] ** (torch.arange(0, ROTARY, 2) / ROTARY)
        cos, sin = (f(angle).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
        part = x[..., :ROTARY]
        turned = torch.cat([-part[..., ROTARY // 2 :], part[..., : ROTARY // 2]], dim=-1)
        return torch.cat([part * cos + turned * sin, x[..., ROTARY:]], dim=-1)
