"""Trainable tensors in flat buffers: one cast, one all-reduce, one optimiser kernel for all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_ALIGNMENT = 64  # elements: views begin at addresses that compiled code may read in wide loads


class FlatParameters:
    """Master values and gradients in float32, working copies in the compute dtype.

    `tensors` holds the working leaves by name: the forward uses them, their gradients collect in one buffer that
    `gather` adds to the master gradient. Groups are contiguous, so that each is one parameter of the optimiser.
    """

    def __init__(self, groups: dict[str, dict[str, Tensor]], dtype: torch.dtype, device: torch.device | str) -> None:
        """groups: initial values by group and name. Empty groups are left out."""
        exact = torch.promote_types(dtype, torch.float32)
        self._places: dict[str, tuple[int, torch.Size]] = {}
        spans: dict[str, tuple[int, int]] = {}
        total = 0
        for group, named in groups.items():
            begin = total
            for name, value in named.items():
                self._places[name] = (total, value.shape)
                total += math.ceil(value.numel() / _ALIGNMENT) * _ALIGNMENT
            if total > begin:
                spans[group] = (begin, total)
        self.master = torch.zeros(total, dtype=exact, device=device)
        self.gradient = torch.zeros_like(self.master)
        self._working = torch.zeros(total, dtype=dtype, device=device)
        self._working_gradient = torch.zeros_like(self._working)
        for named in groups.values():
            for name, value in named.items():
                self.view(self.master, name).copy_(value)
        self.tensors: dict[str, Tensor] = {}
        for name in self._places:
            leaf = self.view(self._working, name).detach().requires_grad_()
            leaf.grad = self.view(self._working_gradient, name)
            self.tensors[name] = leaf
        self.parameters: dict[str, nn.Parameter] = {}
        for group, (begin, end) in spans.items():
            self.parameters[group] = nn.Parameter(self.master[begin:end])
            self.parameters[group].grad = self.gradient[begin:end]
        self.publish()

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """One tensor's place in a buffer of this layout."""
        offset, shape = self._places[name]
        return buffer[offset : offset + shape.numel()].view(shape)

    def masters(self) -> dict[str, Tensor]:
        """Master values by name (views)."""
        return {name: self.view(self.master, name) for name in self._places}

    @property
    def layout(self) -> list[str]:
        """Names and shapes in order: a checkpoint fits only the same layout."""
        return [f"{name} {tuple(shape)}" for name, (_, shape) in self._places.items()]

    @torch.no_grad()
    def gather(self) -> None:
        """Add the working gradients of one backward to the master gradient, and clear them."""
        self.gradient.add_(self._working_gradient)
        self._working_gradient.zero_()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master values to the working copies."""
        self._working.copy_(self.master)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Scale each group's gradient to a norm of at most `limit`; zero where it is not finite. Returns the norms.

        Nothing waits for the device. Groups are clipped apart, so that a draft head does not slow the adapter.
        """
        norms = []
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            norm = parameter.grad.norm()
            finite = torch.isfinite(norm)
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            parameter.grad.mul_(torch.where(finite, (limit / (norm + 1e-6)).clamp(max=1.0), 0.0))
            norms.append(norm)
        return torch.stack(norms)
