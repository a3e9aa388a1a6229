"""The Llama, Qwen2 or Qwen3 decoder as training runs it: packed projections, one function for every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from linocut.engine.loading import read_config
from linocut.engine.models.backbone import Backbone, backbone_from_config
from linocut.engine.models.weights import WeightFiles
from linocut.kernels.rope import rope_table

from .attention import Mask, attend


class LayerShape(NamedTuple):
    """What the layer function needs to know beside its tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float


class LayerWeights(NamedTuple):
    """One layer. qkv: [q|k|v, hidden]; gate_up: [gate|up, hidden]."""

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class LayerAdapter(NamedTuple):
    """Low-rank updates of a layer's four projections: down [rank, in], up [out, rank]; None for no adapter."""

    qkv_down: Tensor | None = None
    qkv_up: Tensor | None = None
    output_down: Tensor | None = None
    output_up: Tensor | None = None
    gate_up_down: Tensor | None = None
    gate_up_up: Tensor | None = None
    down_down: Tensor | None = None
    down_up: Tensor | None = None


NO_ADAPTER = LayerAdapter()


@dataclass
class DecoderWeights:
    """All weights. embedding, head: [vocab, hidden], the same tensor where they are tied."""

    backbone: Backbone
    config: dict[str, Any]
    embedding: Tensor
    head: Tensor
    norm: Tensor
    layers: list[LayerWeights]

    @property
    def tied(self) -> bool:
        return self.head is self.embedding

    @property
    def shape(self) -> LayerShape:
        b = self.backbone
        return LayerShape(b.heads, b.kv_heads, b.head_dim, b.norm_eps)

    def named(self) -> dict[str, Tensor]:
        """Every tensor by the name `with_tensors` takes; a tied head is left out."""
        found = {"embedding": self.embedding, "norm": self.norm}
        if not self.tied:
            found["head"] = self.head
        for index, layer in enumerate(self.layers):
            for field_name, tensor in layer._asdict().items():
                if tensor is not None:
                    found[f"layers.{index}.{field_name}"] = tensor
        return found

    def with_tensors(self, tensors: dict[str, Tensor]) -> DecoderWeights:
        """The same decoder over other tensors of the same names."""
        layers = [
            layer._replace(**{n: tensors[f"layers.{i}.{n}"] for n, t in layer._asdict().items() if t is not None})
            for i, layer in enumerate(self.layers)
        ]
        embedding = tensors["embedding"]
        head = embedding if self.tied else tensors["head"]
        return replace(self, embedding=embedding, head=head, norm=tensors["norm"], layers=layers)


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Read a Hugging Face folder. Raises ModelError."""
    config, _ = read_config(folder)
    backbone = backbone_from_config(config)
    files = WeightFiles(folder, dtype, device)
    b, tensors = backbone, {}
    for name, parts in _packed_names(backbone):
        tensors[name] = torch.cat([files.get(part, shape) for part, shape in parts])
    tied = b.tied_head or "lm_head.weight" not in files
    layers = []
    for index in range(b.layers):
        prefix = f"layers.{index}."
        layers.append(LayerWeights(**{n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}))
    embedding = tensors["embedding"]
    head = embedding if tied else files.get("lm_head.weight", (b.vocab, b.hidden))
    return DecoderWeights(backbone, config, embedding, head, tensors["norm"], layers)


def hugging_face_tensors(decoder: DecoderWeights) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of a Hugging Face folder, unpacked (views of the decoder's tensors)."""
    tensors = decoder.named()
    for name, parts in _packed_names(decoder.backbone):
        pieces = tensors[name].split([shape[0] for _, shape in parts])
        for (part, _), piece in zip(parts, pieces, strict=True):
            yield part, piece
    if not decoder.tied:
        yield "lm_head.weight", decoder.head


def _packed_names(b: Backbone) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Each tensor of ours with the checkpoint's tensors, and their shapes, that stand in it one below the other."""
    q, kv = b.heads * b.head_dim, b.kv_heads * b.head_dim
    yield "embedding", [("model.embed_tokens.weight", (b.vocab, b.hidden))]
    yield "norm", [("model.norm.weight", (b.hidden,))]
    for index in range(b.layers):
        at, ours = f"model.layers.{index}.", f"layers.{index}."
        yield f"{ours}input_norm", [(f"{at}input_layernorm.weight", (b.hidden,))]
        yield f"{ours}post_norm", [(f"{at}post_attention_layernorm.weight", (b.hidden,))]
        if b.qk_norm:
            yield f"{ours}q_norm", [(f"{at}self_attn.q_norm.weight", (b.head_dim,))]
            yield f"{ours}k_norm", [(f"{at}self_attn.k_norm.weight", (b.head_dim,))]
        projections = [
            (
                "qkv",
                [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                b.hidden,
                b.qkv_bias,
            ),
            ("output", [("self_attn.o_proj", b.hidden)], q, b.o_bias),
            ("gate_up", [("mlp.gate_proj", b.intermediate), ("mlp.up_proj", b.intermediate)], b.hidden, b.mlp_bias),
            ("down", [("mlp.down_proj", b.hidden)], b.intermediate, b.mlp_bias),
        ]
        for name, parts, inputs, bias in projections:
            yield f"{ours}{name}", [(f"{at}{part}.weight", (rows, inputs)) for part, rows in parts]
            if bias:
                yield f"{ours}{name}_bias", [(f"{at}{part}.bias", (rows,)) for part, rows in parts]


class RotaryTable:
    """Cosines and sines by position, [positions, head_dim / 2] each."""

    def __init__(self, backbone: Backbone, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        b = backbone
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        table = rope_table(positions, b.head_dim, b.rope_theta, exact, device, scaling=b.rope_scaling).to(dtype)
        self._cos, self._sin = (half.contiguous() for half in table.chunk(2, dim=1))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, queries] -> two tensors [rows, queries, 1, head_dim / 2]."""
        return self._cos[positions][:, :, None], self._sin[positions][:, :, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Llama rounds it: normalised in float32, rounded, then multiplied by the weight."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, scale: float
) -> Tensor:
    """x W^T + b, plus scale · (x down^T) up^T where there is an adapter."""
    y = F.linear(x, weight, bias)
    return y if down is None or up is None else y + F.linear(F.linear(x, down) * scale, up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def run_layer(
    shape: LayerShape,
    weights: LayerWeights,
    adapter: LayerAdapter,
    scale: float,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    context: tuple[Tensor, Tensor] | None,
    mask: Mask,
) -> tuple[Tensor, Tensor, Tensor]:
    """One decoder layer over x [rows, queries, hidden].

    context: keys and values [rows, clean, kv_heads, head_dim] that stand before the layer's own. Returns the new x and
    the layer's own keys (rotated) and values. All state is in the arguments, so that one compilation serves all layers.
    """
    heads, kv_heads, head_dim, eps = shape
    w, a = weights, adapter
    h = rms_norm(x, w.input_norm, eps)
    qkv = project(h, w.qkv, w.qkv_bias, a.qkv_down, a.qkv_up, scale)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=2)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, eps), rms_norm(k, w.k_norm, eps)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    keys, values = k, v
    if context is not None:
        keys, values = torch.cat([context[0], k], dim=1), torch.cat([context[1], v], dim=1)
    attended = attend(q, keys, values, mask).flatten(2)
    x = x + project(attended, w.output, w.output_bias, a.output_down, a.output_up, scale)
    h = rms_norm(x, w.post_norm, eps)
    gate, up = project(h, w.gate_up, w.gate_up_bias, a.gate_up_down, a.gate_up_up, scale).chunk(2, dim=-1)
    return x + project(F.silu(gate) * up, w.down, w.down_bias, a.down_down, a.down_up, scale), k, v


def count_layer_weights(decoder: DecoderWeights) -> int:
    """Elements of the projections of all layers, which a row multiplies once each in a forward."""
    b = decoder.backbone
    q, kv = b.heads * b.head_dim, b.kv_heads * b.head_dim
    return b.layers * (b.hidden * (2 * q + 2 * kv) + 3 * b.hidden * b.intermediate)
