"""The diffusion transformer (DDiT) of MDLM and DiDi-Instruct: bidirectional, modulated by the noise level (adaLN)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .shape import CanvasShape

_FREQUENCIES = 256
_LONGEST_PERIOD = 10_000.0
_ROPE_BASE = 10_000.0
_MLP_RATIO = 4


class Weights(Protocol):
    """Tensors by name, in float32."""

    def __contains__(self, name: str) -> bool: ...
    def get(self, name: str, shape: tuple[int, ...]) -> Tensor: ...


@dataclass
class Linear:
    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Computed and returned in the dtype of the weights."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def read_linear(weights: Weights, name: str, outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> Linear:
    weight = weights.get(f"{name}.weight", (outputs, inputs)).to(dtype)
    return Linear(weight, weights.get(f"{name}.bias", (outputs,)).to(dtype) if bias else None)


@dataclass
class Block:
    norm1: Tensor
    qkv: Linear
    attention_out: Linear
    norm2: Tensor
    up: Linear
    down: Linear
    modulation: Linear  # float32


class Trunk:
    """Embedding, time conditioning and blocks: what the denoiser and the discriminator have in common.

    The residual stream, the norms and the conditioning are float32; matrices and attention are in `dtype`, as under
    the authors' bfloat16 autocast. Nothing here is in place, so that gradients pass.
    """

    def __init__(self, shape: CanvasShape, weights: Weights, prefix: str, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        size, cond, single = shape.hidden, shape.cond, torch.float32
        self.embedding = weights.get(f"{prefix}vocab_embed.embedding", (shape.vocab, size))
        self._time_in = read_linear(weights, f"{prefix}sigma_map.mlp.0", cond, _FREQUENCIES, True, single)
        self._time_out = read_linear(weights, f"{prefix}sigma_map.mlp.2", cond, cond, True, single)
        self._blocks = []
        for index in range(shape.layers):
            at = f"{prefix}blocks.{index}."
            self._blocks.append(
                Block(
                    norm1=weights.get(f"{at}norm1.weight", (size,)),
                    qkv=read_linear(weights, f"{at}attn_qkv", 3 * size, size, False, dtype),
                    attention_out=read_linear(weights, f"{at}attn_out", size, size, False, dtype),
                    norm2=weights.get(f"{at}norm2.weight", (size,)),
                    up=read_linear(weights, f"{at}mlp.0", _MLP_RATIO * size, size, True, dtype),
                    down=read_linear(weights, f"{at}mlp.2", size, _MLP_RATIO * size, True, dtype),
                    modulation=read_linear(weights, f"{at}adaLN_modulation", 6 * size, cond, True, single),
                )
            )
        self._cos, self._sin = _rotation(shape.length, shape.head_dim, self.device)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def condition(self, sigma: Tensor) -> Tensor:
        """Noise levels [rows] float32 -> conditioning [rows, cond] float32."""
        half = _FREQUENCIES // 2
        exponent = torch.arange(half, device=self.device, dtype=torch.float32) / half
        angle = sigma[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * exponent)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)  # [rows, frequencies]
        return F.silu(self._time_out(F.silu(self._time_in(wave))))

    def run(self, x: Tensor, condition: Tensor) -> Tensor:
        """Embeddings [rows, length, hidden] float32 through all blocks, in the same shape and dtype."""
        for block in self._blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition)[:, None].chunk(6, dim=-1)
            attended = self._attend(block, modulate(layer_norm(x, block.norm1), shift1, scale1))
            x = x + gate1 * attended
            hidden = F.gelu(block.up(modulate(layer_norm(x, block.norm2), shift2, scale2)), approximate="tanh")
            x = x + gate2 * block.down(hidden)
        return x

    def _attend(self, block: Block, x: Tensor) -> Tensor:
        rows, length, size = x.shape
        qkv = block.qkv(x).view(rows, length, 3, self.shape.heads, self.shape.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [rows, heads, length, head_dim]
        attended = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v)
        return block.attention_out(attended.transpose(1, 2).reshape(rows, length, size))

    def _rotate(self, x: Tensor) -> Tensor:
        """RoPE, halves rotated against each other: [..., length, head_dim]."""
        first, second = x.float().chunk(2, dim=-1)
        turned = [first * self._cos - second * self._sin, second * self._cos + first * self._sin]
        return torch.cat(turned, dim=-1).to(x.dtype)


class Denoiser:
    """The model that predicts the text behind a canvas of tokens and masks."""

    def __init__(self, shape: CanvasShape, weights: Weights, dtype: torch.dtype) -> None:
        prefix = "backbone." if "backbone.vocab_embed.embedding" in weights else ""
        size, at = shape.hidden, f"{prefix}output_layer."
        self.shape = shape
        self._trunk = Trunk(shape, weights, prefix, dtype)
        self._norm = weights.get(f"{at}norm_final.weight", (size,))
        self._modulation = read_linear(weights, f"{at}adaLN_modulation", 2 * size, shape.cond, True, torch.float32)
        self._head = read_linear(weights, f"{at}linear", shape.vocab, size, True, dtype)

    @property
    def device(self) -> torch.device:
        return self._trunk.device

    def hidden(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Canvases [rows, length] int64 at noise levels [rows] float32 -> [rows, length, hidden] for `logits`."""
        condition = self._trunk.condition(sigma)
        x = self._trunk.run(F.embedding(tokens, self._trunk.embedding), condition)
        shift, scale = self._modulation(condition)[:, None].chunk(2, dim=-1)
        return modulate(layer_norm(x, self._norm), shift, scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, hidden] -> [M, vocab] float32: raw, the mask's own logit among them."""
        return self._head(hidden).float()


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],)) * weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1.0 + scale) + shift


def _rotation(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [length, head_dim / 2] float32 each."""
    frequency = _ROPE_BASE ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()
