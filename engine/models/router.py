"""Routing of a mixture of experts: which experts a token goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.routing import route

from .experts import Experts

Linear = Callable[[Tensor], Tensor]


@dataclass
class Router:
    """Scores every expert for every token and keeps the best."""

    linear: Linear  # [tokens, hidden] float32 -> [tokens, experts]
    bias: Tensor | None  # [experts] float32
    config: Experts
    backend: Backend = "torch"

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden]. Returns experts [tokens, active] int64 and weights [tokens, active] float32.

        In float32, whatever the model's dtype: a rounded score sends a token elsewhere. Qwen3-MoE: softmax over all,
        the best, renormalised. LLaDA2: sigmoid, a bias for choosing, experts of the groups whose two best sum highest,
        weights without the bias. LLaDA-MoE: softmax, not renormalised, a bias that counts.

        LLaDA2.2: as LLaDA2, but among the experts that score highest anywhere in the token's block instead of those of
        groups. Entries i * block .. (i + 1) * block - 1 of x are then a block of one sequence, or padding: whoever runs
        such a model runs whole blocks (`FamilyTraits.routes_blocks`).
        """
        c = self.config
        return route(
            self.linear(x.float()),
            self.bias,
            active=c.active,
            score=c.score,
            bias_counts=c.expert_bias == "weight",
            groups=c.groups,
            active_groups=c.active_groups,
            block=c.block,
            capacity=c.capacity,
            normalise=c.normalise,
            scale=c.scale,
            backend=self.backend,
        )
