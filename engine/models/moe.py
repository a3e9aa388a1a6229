"""A mixture of experts in place of an MLP: routing, and each token through its experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from linocut.kernels.backend import Backend
from linocut.kernels.norm import silu_and_mul

from .adapter import Weights
from .experts import Experts
from .linear import pack_linear

Linear = Callable[[Tensor], Tensor]


@dataclass
class Router:
    """Which experts a token goes to, and with what weight."""

    linear: Linear  # [tokens, hidden] float32 -> [tokens, experts]
    bias: Tensor | None  # [experts] float32
    config: Experts

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden]. Returns experts [tokens, active] int64 and weights [tokens, active] float32.

        In float32, whatever the model's dtype: a rounded score sends a token elsewhere. Each token by itself; on equal
        scores the lowest expert first. Qwen3-MoE: softmax over all, the best, renormalised. LLaDA2: sigmoid, a bias for
        choosing, experts of the groups whose two best sum highest, weights without the bias. LLaDA-MoE: softmax, not
        renormalised, a bias that counts.
        """
        c = self.config
        logits = self.linear(x.float())
        scores = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(-1)
        ranked = scores
        if self.bias is not None:
            ranked = scores + self.bias
            if c.expert_bias == "weight":
                scores = ranked
        if c.groups > 1:
            ranked = ranked.masked_fill(~self._in_best_groups(ranked), -torch.inf)
        experts = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, : c.active]
        weights = scores.gather(1, experts)
        if c.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if c.score == "sigmoid" else 0.0))
        return experts, weights * c.scale

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        """[tokens, experts] bool"""
        c = self.config
        grouped = scores.view(-1, c.groups, c.count // c.groups)
        of_group = grouped.topk(2, dim=-1).values.sum(-1)
        best = torch.sort(of_group, dim=1, descending=True, stable=True).indices[:, : c.active_groups]
        chosen = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        return chosen[:, :, None].expand_as(grouped).reshape(scores.shape)


class MoeMlp:
    """down(silu(gate(x)) * up(x)) of each token's experts, weighted and summed in float32, plus the shared experts."""

    def __init__(
        self,
        weights: Weights,
        at: str,
        hidden: int,
        config: Experts,
        quantization: Literal["none", "int8"],
        backend: Backend,
    ) -> None:
        """at: the layer's prefix of tensor names, "model.layers.0.mlp."."""
        self._config, self._backend = config, backend
        gate = weights.get(f"{at}gate.weight", (config.count, hidden)).float()
        bias = weights.get(f"{at}gate.expert_bias", (config.count,)).float() if config.expert_bias != "none" else None
        self.router = Router(pack_linear(gate, None, "none"), bias, config)

        def gate_up(name: str, width: int) -> Tensor:
            return torch.cat([weights.get(f"{at}{name}{part}_proj.weight", (width, hidden)) for part in ("gate", "up")])

        def down(name: str, width: int) -> Tensor:
            return weights.get(f"{at}{name}down_proj.weight", (hidden, width))

        width, shared = config.intermediate, config.shared_intermediate
        self._shared: tuple[Linear, Linear] | None = None
        if shared:
            name = "shared_experts." if f"{at}shared_experts.gate_proj.weight" in weights else "shared_expert."
            up, out = gate_up(name, shared), down(name, shared)
            self._shared = pack_linear(up, None, quantization), pack_linear(out, None, quantization)
        ups = [gate_up(f"experts.{index}.", width) for index in range(config.count)]
        downs = [down(f"experts.{index}.", width) for index in range(config.count)]
        self._experts: list[tuple[Linear, Linear]] = []
        if gate.device.type == "cpu":
            self._experts = [
                (pack_linear(up, None, quantization), pack_linear(out, None, quantization))
                for up, out in zip(ups, downs, strict=True)
            ]
        else:
            # [experts, in, out], column-major in the last two, as the grouped product takes them.
            self._ups = torch.stack(ups).transpose(1, 2)
            self._downs = torch.stack(downs).transpose(1, 2)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        experts, weights = self.router(x)
        routed = self._one_by_one(x, experts, weights) if self._experts else self._grouped(x, experts, weights)
        y = routed.to(x.dtype)
        if self._shared is not None:
            up, down = self._shared
            y = y + down(silu_and_mul(up(x), backend=self._backend))
        return y

    def _one_by_one(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """On the CPU, where reading which experts are wanted costs nothing: one product for each of these.

        Every place of a token's choice is summed by itself and in the same order, whatever else the batch holds.
        """
        parts = x.new_zeros((*experts.shape, x.shape[1]), dtype=torch.float32)  # [tokens, active, hidden]
        for index in experts.unique().tolist():
            token, place = (experts == index).nonzero(as_tuple=True)
            up, down = self._experts[index]
            y = down(silu_and_mul(up(x[token]), backend=self._backend))
            parts[token, place] = y.float() * weights[token, place, None]
        return parts.sum(1)

    def _grouped(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Tokens sorted by expert, then one grouped product for all; nothing waits for the device."""
        tokens, active = experts.shape
        flat = experts.flatten()
        order = torch.sort(flat, stable=True).indices
        counts = torch.zeros(self._config.count, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // active]
        h = _product(rows, self._ups, ends)
        gate, up = h.chunk(2, dim=-1)
        y = _product((silu(gate) * up).to(x.dtype), self._downs, ends)
        placed = torch.empty_like(y).index_copy_(0, order, y).view(tokens, active, -1)
        return (placed.float() * weights[..., None]).sum(1)


def _product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows [n, in], sorted by expert, times weights [experts, in, out]. ends: [experts] int32, where its rows end.

    torch's grouped product takes bfloat16; other dtypes run every expert over all rows, which is right and slow.
    """
    if rows.dtype == torch.bfloat16:
        y: Tensor = torch._grouped_mm(rows, weights, offs=ends)
        return y
    index = torch.arange(rows.shape[0], device=rows.device)
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    y = rows.new_zeros((rows.shape[0], weights.shape[2]))
    for expert in range(weights.shape[0]):
        mine = (index >= first[expert]) & (index < ends[expert])
        y = torch.where(mine[:, None], rows @ weights[expert], y)
    return y
