"""A mixture of experts in place of an MLP: each token through its experts, and through those that all tokens share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.experts import mix_experts
from linocut.kernels.norm import silu_and_mul

from .adapter import Weights
from .experts import Experts
from .linear import pack_linear
from .router import Router

Linear = Callable[[Tensor], Tensor]


class MoeMlp:
    """down(silu(gate(x)) * up(x)) of each token's experts, weighted and summed in float32, plus the shared experts.

    On the CPU a token's result is its own, bit for bit, wherever `pack_linear` says so of a row (float32 and int8), or
    that of its block where experts are chosen by blocks.
    """

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
        self._backend = backend
        gate = weights.get(f"{at}gate.weight", (config.count, hidden)).float()
        bias = weights.get(f"{at}gate.expert_bias", (config.count,)).float() if config.expert_bias != "none" else None
        self.router = Router(pack_linear(gate, None, "none"), bias, config, backend)

        def gate_up(name: str, width: int) -> Tensor:
            return torch.cat([weights.get(f"{at}{name}{part}_proj.weight", (width, hidden)) for part in ("gate", "up")])

        def down(name: str, width: int) -> Tensor:
            return weights.get(f"{at}{name}down_proj.weight", (hidden, width))

        shared = config.shared_intermediate
        self._shared: tuple[Linear, Linear] | None = None
        if shared:
            name = "shared_experts." if f"{at}shared_experts.gate_proj.weight" in weights else "shared_expert."
            up, out = gate_up(name, shared), down(name, shared)
            self._shared = pack_linear(up, None, quantization), pack_linear(out, None, quantization)
        width = config.intermediate
        ups = (gate_up(f"experts.{index}.", width) for index in range(config.count))
        downs = (down(f"experts.{index}.", width) for index in range(config.count))
        self._experts: PackedExperts | GroupedExperts
        if gate.device.type == "cpu":
            self._experts = PackedExperts(
                [pack_linear(up, None, quantization) for up in ups],
                [pack_linear(out, None, quantization) for out in downs],
                backend,
            )
        else:
            self._experts = GroupedExperts(torch.stack(list(ups)), torch.stack(list(downs)), backend)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        experts, weights = self.router(x)
        y = self._experts(x, experts, weights).to(x.dtype)
        if self._shared is not None:
            up, down = self._shared
            y = y + down(silu_and_mul(up(x), backend=self._backend))
        return y


class PackedExperts:
    """For the CPU, where reading which experts are wanted costs nothing: one product for each of these."""

    def __init__(self, ups: list[Linear], downs: list[Linear], backend: Backend) -> None:
        """Of each expert: ups, hidden -> gate and up side by side; downs, intermediate -> hidden."""
        self._ups, self._downs, self._backend = ups, downs, backend

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x: [tokens, hidden]; experts, weights: [tokens, active]. Returns [tokens, hidden] float32.

        Every place of a token's choice is computed by itself, and they are summed in the same order whatever else the
        batch holds.
        """
        parts = x.new_zeros((*experts.shape, x.shape[1]), dtype=torch.float32)  # [tokens, active, hidden]
        for index in experts.unique().tolist():
            token, place = (experts == index).nonzero(as_tuple=True)
            y = self._downs[index](silu_and_mul(self._ups[index](x[token]), backend=self._backend))
            parts[token, place] = y.float() * weights[token, place, None]
        return parts.sum(1)


class GroupedExperts:
    """For the GPU: tokens sorted by expert, then grouped products for all."""

    def __init__(self, ups: Tensor, downs: Tensor, backend: Backend) -> None:
        """ups: [experts, 2 * intermediate, hidden], gate before up; downs: [experts, hidden, intermediate]."""
        self._ups, self._downs, self._backend = ups, downs, backend

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x: [tokens, hidden]; experts, weights: [tokens, active]. Returns [tokens, hidden] in x's dtype."""
        return mix_experts(x, self._ups, self._downs, experts, weights, backend=self._backend)
