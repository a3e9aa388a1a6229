"""Routing of a mixture of experts: which experts a token goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .experts import Experts

Linear = Callable[[Tensor], Tensor]


@dataclass
class Router:
    """Scores every expert for every token and keeps the best."""

    linear: Linear  # [tokens, hidden] float32 -> [tokens, experts]
    bias: Tensor | None  # [experts] float32
    config: Experts

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden]. Returns experts [tokens, active] int64 and weights [tokens, active] float32.

        In float32, whatever the model's dtype: a rounded score sends a token elsewhere. Each token by itself; on equal
        scores the lowest expert first. Qwen3-MoE: softmax over all, the best, renormalised. LLaDA2: sigmoid, a bias for
        choosing, experts of the groups whose two best sum highest, weights without the bias. LLaDA-MoE: softmax, not
        renormalised, a bias that counts.

        LLaDA2.2: as LLaDA2, but among the experts that score highest anywhere in the token's block instead of those of
        groups. Entries i * block .. (i + 1) * block - 1 of x are then a block of one sequence, or padding: whoever runs
        such a model runs whole blocks (`FamilyTraits.routes_blocks`).
        """
        c = self.config
        logits = self.linear(x.float())
        # torch's own sigmoid rounds an element by where it lies in the batch; this form does not.
        scores = (1 + (-logits).exp()).reciprocal() if c.score == "sigmoid" else logits.softmax(-1)
        ranked = scores
        if self.bias is not None:
            ranked = scores + self.bias
            if c.expert_bias == "weight":
                scores = ranked
        if c.groups > 1:
            ranked = ranked.masked_fill(~self._in_best_groups(ranked), -torch.inf)
        if c.capacity:
            ranked = ranked.masked_fill(~self._in_best_of_block(ranked), -torch.inf)
        experts = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, : c.active]
        weights = scores.gather(1, experts)
        if c.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if c.score == "sigmoid" else 0.0))
        return experts, weights * c.scale

    def _in_best_of_block(self, scores: Tensor) -> Tensor:
        """[tokens, experts] bool"""
        c, tokens = self.config, scores.shape[0]
        # Padding may end anywhere.
        filled = pad(scores, (0, 0, 0, -tokens % c.block), value=-torch.inf)
        of_block = filled.view(-1, c.block, c.count).amax(dim=1)  # [blocks, experts]
        best = torch.sort(of_block, dim=1, descending=True, stable=True).indices[:, : c.capacity]
        chosen = torch.zeros_like(of_block, dtype=torch.bool).scatter_(1, best, True)
        return chosen[:, None].expand(-1, c.block, -1).reshape(-1, c.count)[:tokens]

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        """[tokens, experts] bool"""
        c = self.config
        grouped = scores.view(-1, c.groups, c.count // c.groups)
        of_group = grouped.topk(2, dim=-1).values.sum(-1)
        best = torch.sort(of_group, dim=1, descending=True, stable=True).indices[:, : c.active_groups]
        chosen = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        return chosen[:, :, None].expand_as(grouped).reshape(scores.shape)
