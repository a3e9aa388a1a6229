"""The decoder-only transformer of Llama and its relatives (`Backbone`), over a paged K/V cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from linocut.kernels.attention import AttentionLayout, plan_attention, staircase_attention
from linocut.kernels.attention_flash import FlashAttention
from linocut.kernels.backend import Backend
from linocut.kernels.norm import rms_norm
from linocut.kernels.rope import HeadNorm, rope_and_cache_write, rope_table

from ..errors import ModelError
from ..parallel.ranks import ALONE, Ranks
from ..parallel.split import SplitWeights, part_of
from ..parallel.vocabulary import VocabShare
from .adapter import MASK_EMBEDDING, Adapter, Gate, WeightsInParts, activated, read_adapter
from .backbone import Backbone
from .draft_head import read_draft_head
from .few_rows import FewRowsLinear, has_few_rows_kernel
from .linear import DenseLinear, has_integers, pack_linear
from .moe import MoeMlp
from .names import NamedWeights
from .whole_layers import whole_layers

Linear = Callable[[Tensor], Tensor]
Projection = Linear | Adapter


@dataclass
class Layer:
    input_norm: Tensor
    qkv: Projection
    qk_norm: HeadNorm | None
    output: Projection
    post_norm: Tensor
    gate_up: Projection | None
    down: Projection | None
    moe: MoeMlp | None = None

    @property
    def last(self) -> Projection:
        """What ends it: the way down, or the experts as a whole."""
        last = self.down or self.moe
        assert last is not None
        return last


@dataclass
class KVCache:
    """Per layer, keys (rotated) and values: [pages, page_size, kv_heads, head_dim]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[1]


def allocate_cache(backbone: Backbone, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Zeroed pages; page 0 takes the writes of padding rows."""
    shape = (pages, page_size, backbone.kv_heads, backbone.head_dim)

    def layers() -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(backbone.layers)]

    return KVCache(layers(), layers())


class Decoder:
    """Weights of one backbone, or a rank's part of them, and its forward.

    RMSNorm rounds as the family's own code does (`fused_norm`). ranks: all of them make the same calls; the residual
    stream is whole in each.
    adapter_rank: of the gated adapter among `weights`, 0 where there is none. mask_id: the id whose embedding on
    rows that are not final is the adapter's own.
    """

    def __init__(
        self,
        backbone: Backbone,
        weights: WeightsInParts,
        *,
        fused_norm: bool,
        positions: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Literal["none", "int8"],
        backend: Backend,
        flash: FlashAttention | None = None,
        adapter_rank: int = 0,
        mask_id: int | None = None,
        draft_head: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.backbone, self.fused_norm, self.backend, self.flash = backbone, fused_norm, backend, flash
        self.dtype, self.device = dtype, device
        self.ranks, self.share = ranks, VocabShare(backbone.vocab, ranks)
        self.part = part_of(backbone, ranks.size)
        b = backbone
        q_size, kv_size = b.heads * b.head_dim, b.kv_heads * b.head_dim
        self.scale = b.head_dim**-0.5
        try:
            precision = torch.float32 if b.rope_float32 else dtype
            self.rope = rope_table(
                positions, b.head_dim, b.rope_theta, precision, device, rotary_dim=b.rotary_dim, scaling=b.rope_scaling
            )
        except KeyError as error:
            raise ModelError(f"config.json's rope_scaling lacks {error.args[0]!r}") from None
        except ValueError as error:
            raise ModelError(str(error)) from None
        self.query_scale: Tensor | None = None  # [positions, 1, 1], where it is ever more than one
        if b.query_scaling is not None and positions > b.query_scaling[1]:
            beta, period = b.query_scaling
            turns = torch.arange(positions, device=device) // period
            self.query_scale = (1 + beta * torch.log1p(turns.float())).to(dtype)[:, None, None]
        parts = SplitWeights(NamedWeights(weights, b), b, self.share)
        self.embedding = parts.get("model.embed_tokens.weight", (b.vocab, b.hidden))
        self.norm = parts.get("model.norm.weight", (b.hidden,))
        tied = b.tied_head or "lm_head.weight" not in parts
        head = self.embedding if tied else parts.get("lm_head.weight", (b.vocab, b.hidden))
        few_rows = backend == "triton" and has_few_rows_kernel(device)

        def pack(weight: Tensor, bias: Tensor | None, mode: Literal["none", "int8"]) -> Linear:
            packed = pack_linear(weight, bias, mode, backend)
            return FewRowsLinear.over(packed) if few_rows and isinstance(packed, DenseLinear) else packed

        # As the layers are where they are ours; torch's int8 changes the argmax of every ninth position.
        ours: Literal["none", "int8"] = quantization if has_integers(quantization, backend) else "none"
        self.head = pack(head, None, ours)
        self.draft_head = None
        if draft_head:
            self.draft_head = read_draft_head(parts, b.hidden, self.embedding, head, self.share, backend, ours)
        self.mask_id = mask_id
        self.mask_embedding = parts.get(MASK_EMBEDDING, (b.hidden,)) if adapter_rank else None

        def linear(names: list[tuple[str, int]], inputs: int, bias: bool) -> Linear:
            weight = torch.cat([parts.get(f"{name}.weight", (rows, inputs)) for name, rows in names])
            biases = [parts.get(f"{name}.bias", (rows,)) for name, rows in names] if bias else None
            return pack(weight, torch.cat(biases) if biases else None, quantization)

        def projection(at: str, names: list[tuple[str, int]], inputs: int, bias: bool) -> Projection:
            base, outputs = linear(names, inputs, bias), sum(rows for _, rows in names)
            return read_adapter(parts, at, base, inputs, outputs, adapter_rank, backend) if adapter_rank else base

        def head_norm(at: str) -> HeadNorm:
            query, key = (parts.get(f"{at}self_attn.{n}_norm.weight", (b.head_dim,)) for n in ("q", "k"))
            return HeadNorm(query, key, b.norm_eps, fused_norm)

        self.layers = []
        for index in range(b.layers):
            at = f"model.layers.{index}."
            qkv = [(f"{at}self_attn.{n}_proj", size) for n, size in (("q", q_size), ("k", kv_size), ("v", kv_size))]
            gate_up = [(f"{at}mlp.{n}_proj", b.intermediate) for n in ("gate", "up")]
            output, down = f"{at}self_attn.o_proj", f"{at}mlp.down_proj"
            sparse = b.experts if b.experts is not None and b.experts.at(index) else None
            self.layers.append(
                Layer(
                    input_norm=parts.get(f"{at}input_layernorm.weight", (b.hidden,)),
                    qkv=projection(f"{at}self_attn.qkv_proj", qkv, b.hidden, b.qkv_bias),
                    qk_norm=head_norm(at) if b.qk_norm else None,
                    output=projection(output, [(output, b.hidden)], q_size, b.o_bias),
                    post_norm=parts.get(f"{at}post_attention_layernorm.weight", (b.hidden,)),
                    gate_up=None if sparse else projection(f"{at}mlp.gate_up_proj", gate_up, b.hidden, b.mlp_bias),
                    down=None if sparse else projection(down, [(down, b.hidden)], b.intermediate, b.mlp_bias),
                    moe=MoeMlp(parts, f"{at}mlp.", b.hidden, sparse, quantization, backend) if sparse else None,
                )
            )

        # Between ranks there are sums.
        self.whole = whole_layers(self.layers, self.part, self.rope, self.backend) if ranks.size == 1 else None

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: KVCache,
        layout: AttentionLayout,
        noisy: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run `tokens` rows and write their K/V to `slots` before anything reads them.

        ids, positions (RoPE), slots (flat: page * page_size + offset): [tokens] int32. noisy: [tokens] bool, the rows
        that a gated adapter acts on; None: on none. added: [tokens, hidden] to their embeddings, or None. Returns the
        last layer's hidden states before the final norm, [tokens, hidden].
        """
        b = self.part
        gate = Gate(noisy, self.dtype) if noisy is not None and isinstance(self.layers[0].qkv, Adapter) else None
        sizes = [b.heads, b.kv_heads, b.kv_heads]
        # Before the embedding, so that all that describes the rows is older than a kernel of torch's.
        plan_attention(layout, ids.shape[0], b.heads, cache.keys[0], backend=self.backend, flash=self.flash)
        residual = self.share.embed(ids, self.embedding)
        if noisy is not None and self.mask_embedding is not None:
            # A mask id in a prompt is a final token like any other.
            masks = noisy & (ids == self.mask_id)
            residual = torch.where(masks[:, None], self.mask_embedding, residual)
        if added is not None:
            residual = residual + added
        if self.whole is not None and self.query_scale is None:
            noisy_rows = None if gate is None else gate.indices
            return self.whole.run(residual, positions, slots, cache.keys, cache.values, layout, noisy_rows)
        x = rms_norm(residual, self.layers[0].input_norm, b.norm_eps, self.fused_norm, backend=self.backend)
        for index, layer in enumerate(self.layers):
            qkv = _project(layer.qkv, x, gate).view(-1, sum(sizes), b.head_dim)
            q, k, v = qkv.split(sizes, dim=1)  # [tokens, heads | kv_heads, head_dim], views
            keys, values, norm = cache.keys[index], cache.values[index], layer.qk_norm
            q = rope_and_cache_write(
                q, k, v, self.rope, positions, slots, keys, values, norm=norm, backend=self.backend
            )
            if self.query_scale is not None:
                q = q * self.query_scale.index_select(0, positions)
            attended = staircase_attention(q, keys, values, layout, self.scale, backend=self.backend, flash=self.flash)
            attended = attended.reshape(attended.shape[0], -1)
            x, residual = self._sum_and_norm(layer.output, attended, gate, residual, layer.post_norm)
            if layer.gate_up is not None:
                up = layer.gate_up
                x = up.activated(x, gate) if isinstance(up, Adapter) else activated(up, x, self.backend)
            if index + 1 < len(self.layers):
                x, residual = self._sum_and_norm(layer.last, x, gate, residual, self.layers[index + 1].input_norm)
        return self.ranks.sum(_project(layer.last, x, gate)) + residual

    def _sum_and_norm(
        self, product: Projection, x: Tensor, gate: Gate | None, residual: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a product gives, summed with the other ranks' and the residual: the norm of it, and itself."""
        eps, fused, backend = self.backbone.norm_eps, self.fused_norm, self.backend
        letters = self.ranks.letters(residual, backend)
        if letters is not None and isinstance(product, FewRowsLinear) and product.takes_letters(x):
            part = product.sent(x, letters)
            return self.ranks.sum_and_norm(part, residual, weight, eps, fused, backend, sent=True)
        return self.ranks.sum_and_norm(_project(product, x, gate), residual, weight, eps, fused, backend)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] before the final norm -> [rows, width of the share] in the model's dtype."""
        return self.share.fill(self.head(self.normed(hidden)))

    def all_logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] before the final norm -> [rows, vocab], from all ranks."""
        return self.share.whole(self.logits(hidden))

    @cached_property
    def mix(self) -> Linear:
        """[rows, width of the share] -> [rows, hidden]: the product with the embedding, for those who mix it.

        Packed as any other product is, so that on a CPU a row's result is the same beside other rows.
        """
        mixing = self.embedding.T
        return pack_linear(mixing.contiguous() if mixing.device.type == "cpu" else mixing, None, "none", self.backend)

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm: [rows, hidden] -> [rows, hidden]."""
        return rms_norm(hidden, self.norm, self.backbone.norm_eps, self.fused_norm, backend=self.backend)


def _project(projection: Projection, x: Tensor, gate: Gate | None) -> Tensor:
    return projection(x, gate) if isinstance(projection, Adapter) else projection(x)
