"""DiDi-Instruct's discriminator: the reward of a canvas, and its gradient with respect to soft tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .shape import CanvasShape
from .transformer import Linear, Trunk, Weights


class Discriminator:
    """The denoiser's trunk with a head of two spectrally normalised layers: a logit for each position."""

    def __init__(self, shape: CanvasShape, weights: Weights, dtype: torch.dtype) -> None:
        self._trunk = Trunk(shape, weights, "", dtype)
        self._inner = _read_normalised(weights, "output_layer.main.0", shape.hidden, shape.hidden, dtype)
        self._outer = _read_normalised(weights, "output_layer.main.2", 1, shape.hidden, dtype)

    @property
    def embedding(self) -> Tensor:
        """[vocab, hidden] float32; a soft token is a mean of its rows."""
        return self._trunk.embedding

    def scores(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Embeddings [rows, length, hidden] float32 at noise levels [rows] -> logits [rows, length] float32."""
        x = self._trunk.run(x, self._trunk.condition(sigma))
        return self._outer(F.silu(self._inner(x)))[..., 0].float()

    def rewards(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """The summed logits of canvases [rows, length] int64, masks included: [rows] float32."""
        return self.scores(F.embedding(tokens, self.embedding), sigma).sum(-1)

    def gradient(self, x: Tensor, sigma: Tensor, counted: Tensor) -> Tensor:
        """The derivative, shaped as `x`, of the logits summed over the positions `counted` ([rows, length] bool)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            total = (self.scores(x, sigma) * counted).sum()
            (gradient,) = torch.autograd.grad(total, x)
        return gradient


def _read_normalised(weights: Weights, name: str, outputs: int, inputs: int, dtype: torch.dtype) -> Linear:
    """A layer under torch's spectral norm: divided by the singular value that its stored vectors u, v estimate."""
    if f"{name}.weight_orig" in weights:
        weight = weights.get(f"{name}.weight_orig", (outputs, inputs))
        u, v = weights.get(f"{name}.weight_u", (outputs,)), weights.get(f"{name}.weight_v", (inputs,))
        weight = weight / torch.dot(u, weight @ v)
    else:
        weight = weights.get(f"{name}.weight", (outputs, inputs))
    return Linear(weight.to(dtype), weights.get(f"{name}.bias", (outputs,)).to(dtype))
