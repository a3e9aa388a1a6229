"""What trains: low-rank adapters, the mask embedding, the draft head; their names in adapter.safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from linocut.engine.errors import ModelError
from linocut.engine.models.backbone import Backbone

from .backbone import DecoderWeights, LayerAdapter

MASK_EMBEDDING = "model.mask_embedding"
DRAFT_INPUT, DRAFT_OUTPUT = "draft_head.input", "draft_head.output"
DRAFT_PREFIX = "draft_head."
# In the order of LayerAdapter's fields.
HALVES = ("down", "up")
PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def projection_sizes(backbone: Backbone) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each projection that has an adapter."""
    b = backbone
    q, kv = b.heads * b.head_dim, b.kv_heads * b.head_dim
    sizes = [(q + 2 * kv, b.hidden), (b.hidden, q), (2 * b.intermediate, b.hidden), (b.hidden, b.intermediate)]
    return dict(zip(PROJECTIONS, sizes, strict=True))


def adapter_name(layer: int, projection: str, half: str) -> str:
    return f"model.layers.{layer}.{projection}.adapter.{half}"


def new_adapter(backbone: Backbone, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A fresh adapter, which changes nothing yet: down is Kaiming-uniform, up zero (LoRA, arXiv 2106.09685, 4.1)."""
    tensors = {}
    for layer in range(backbone.layers):
        for projection, (outputs, inputs) in projection_sizes(backbone).items():
            bound = (1.0 / inputs) ** 0.5
            down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
            tensors[adapter_name(layer, projection, "down")] = down
            tensors[adapter_name(layer, projection, "up")] = torch.zeros(outputs, rank)
    return tensors


def new_mask_embedding(decoder: DecoderWeights) -> dict[str, Tensor]:
    """The mean embedding: far from no token."""
    return {MASK_EMBEDDING: decoder.embedding.float().mean(0).cpu()}


def new_draft_head(hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A draft head that changes nothing yet."""
    bound = (1.0 / (2 * hidden)) ** 0.5
    inputs = torch.empty(hidden, 2 * hidden).uniform_(-bound, bound, generator=generator)
    return {DRAFT_INPUT: inputs, DRAFT_OUTPUT: torch.zeros(hidden, hidden)}


def layer_adapters(tensors: dict[str, Tensor], layers: int) -> list[LayerAdapter]:
    """The adapters by layer, as `run_layer` takes them."""
    return [
        LayerAdapter(*(tensors[adapter_name(i, projection, half)] for projection in PROJECTIONS for half in HALVES))
        for i in range(layers)
    ]


def draft_hidden(hidden: Tensor, embedding: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
    """The draft head: h + output · silu(input · [h ; e]), with e scaled to unit root mean square.

    hidden: [rows, hidden], final-normed; embedding: [rows, hidden], of the token before each row's target.
    """
    wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    unit = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-12)).to(hidden.dtype)
    return hidden + F.linear(F.silu(F.linear(torch.cat([hidden, unit], dim=-1), inputs)), output)


def save_adapter(tensors: dict[str, Tensor], scale: float, path: Path, dtype: torch.dtype) -> None:
    """Write adapter.safetensors, whole or not at all; `scale` is folded into every `up`."""
    folded = {
        name: (tensor.float() * scale if name.endswith(".adapter.up") else tensor.float()).to(dtype).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    part = path.with_name(f"{path.name}.partial")
    save_file(folded, part, metadata={"format": "pt"})
    part.replace(path)


def load_adapter(path: Path, scale: float) -> dict[str, Tensor]:
    """Read adapter.safetensors as float32, `scale` taken out of every `up`. Raises ModelError."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as an adapter: {error}") from None
    return {n: t.float() / scale if n.endswith(".adapter.up") else t.float() for n, t in tensors.items()}


def merge_adapter(decoder: DecoderWeights, adapters: list[LayerAdapter], scale: float) -> DecoderWeights:
    """The decoder with every projection W replaced by W + scale · up · down."""

    def merged(weight: Tensor, down: Tensor | None, up: Tensor | None) -> Tensor:
        assert down is not None
        assert up is not None
        return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)

    layers = [
        w._replace(
            qkv=merged(w.qkv, a.qkv_down, a.qkv_up),
            output=merged(w.output, a.output_down, a.output_up),
            gate_up=merged(w.gate_up, a.gate_up_down, a.gate_up_up),
            down=merged(w.down, a.down_down, a.down_up),
        )
        for w, a in zip(decoder.layers, adapters, strict=True)
    ]
    return DecoderWeights(decoder.backbone, decoder.config, decoder.embedding, decoder.head, decoder.norm, layers)
