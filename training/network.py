"""The two streams of a training step: clean rows and noisy rows, through one compiled layer function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from linocut.engine.errors import ModelError

from .adapter import DRAFT_INPUT, DRAFT_OUTPUT, MASK_EMBEDDING, draft_hidden, layer_adapters
from .attention import Mask, MaskBuffers
from .backbone import NO_ADAPTER, DecoderWeights, LayerAdapter, RotaryTable, rms_norm, run_layer
from .documents import Rows
from .loss import HeadLoss, LossWeights, Objective, RowLosses, Teacher
from .segments import Segments, clean_targets, clean_visibility
from .settings import AdaptSettings

FULL_PREFIX = "weights."
_RECOMPILE_LIMIT = 32  # one layer function, compiled for each stream with and without gradient
KeysValues = list[tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """One micro-batch. block: segment length. chosen: indices [k] of the noisy rows that pass the head; None: all.

    clean_weight: [rows, length], of the autoregressive term; None without one.
    """

    rows: Rows
    segments: Segments
    block: int
    partial: bool
    chosen: Tensor | None
    clean_weight: Tensor | None


class Counts(NamedTuple):
    """Sums of the weights of all micro-batches of an update, in all processes: what a loss is divided by."""

    noisy: Tensor
    clean: Tensor


class Output(NamedTuple):
    """Loss of a micro-batch and what its rows lost. `weight`, `offset`: of the rows in `noisy` and `draft`."""

    loss: Tensor
    noisy: RowLosses
    draft: RowLosses | None
    clean: RowLosses | None
    weight: Tensor
    offset: Tensor


class Network:
    """The frozen decoder, what trains on it, and the forward of both streams.

    tensors: the working leaves by name (adapter, mask embedding, draft head, or "weights.…" for all weights).
    """

    def __init__(
        self, settings: AdaptSettings, decoder: DecoderWeights, tensors: dict[str, Tensor], flex: bool, compiled: bool
    ) -> None:
        self.settings, self.decoder, self.tensors = settings, decoder, tensors
        s, backbone, device = settings, decoder.backbone, decoder.embedding.device
        if backbone.heads % backbone.kv_heads:
            raise ModelError(
                f"{backbone.heads} attention heads cannot share {backbone.kv_heads} key-value heads evenly"
            )
        positions = s.length + max(s.segments) + 1
        self._rotary = RotaryTable(backbone, positions, decoder.embedding.dtype, device)
        self._none = [NO_ADAPTER] * backbone.layers
        self._adapters = self._none
        self._student = decoder
        if s.mode == "full":
            own = {n.removeprefix(FULL_PREFIX): t for n, t in tensors.items() if n.startswith(FULL_PREFIX)}
            self._student = decoder.with_tensors(own)
        else:
            self._adapters = layer_adapters(tensors, backbone.layers)
        self._clean_mask = MaskBuffers(s.rows, s.length, s.length, device, flex)
        self._noisy_mask = MaskBuffers(s.rows, s.noisy_rows, s.length + s.noisy_rows, device, flex)
        self._teacher_mask = self._clean_mask
        if s.context != "token-causal":
            self._teacher_mask = MaskBuffers(s.rows, s.length, s.length, device, flex)
        self._layer, self._norm, self._draft = run_layer, rms_norm, draft_hidden
        if compiled:
            torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
            self._layer = torch.compile(run_layer, dynamic=False, fullgraph=True)
            self._norm = torch.compile(rms_norm, dynamic=False, fullgraph=True)
            self._draft = torch.compile(draft_hidden, dynamic=False, fullgraph=True)
        self._head_loss = HeadLoss(s.head_chunk, compiled)

    def run_clean(
        self, rows: Rows, decoder: DecoderWeights, adapters: list[LayerAdapter], mask: Mask
    ) -> tuple[Tensor, KeysValues]:
        """Clean rows through the layers: final-normed hidden [rows, length, hidden], and keys and values by layer."""
        cos, sin = self._rotary.at(rows.positions)
        x = F.embedding(rows.tokens, decoder.embedding)
        kept: KeysValues = []
        for weights, adapter in zip(decoder.layers, adapters, strict=True):
            x, k, v = self._layer(decoder.shape, weights, adapter, self.settings.scale, x, cos, sin, None, mask)
            kept.append((k, v))
        return self._norm(x, decoder.norm, decoder.backbone.norm_eps), kept

    def run_noisy(self, segments: Segments, context: KeysValues, mask: Mask) -> Tensor:
        """Noisy rows over the clean rows' keys and values: final-normed hidden [rows, noisy_rows, hidden]."""
        decoder = self._student
        cos, sin = self._rotary.at(segments.positions)
        x = F.embedding(segments.tokens, decoder.embedding)
        x = torch.where(segments.masked[..., None], self.tensors[MASK_EMBEDDING], x)
        for weights, adapter, kv in zip(decoder.layers, self._adapters, context, strict=True):
            x, _, _ = self._layer(decoder.shape, weights, adapter, self.settings.scale, x, cos, sin, kv, mask)
        return self._norm(x, decoder.norm, decoder.backbone.norm_eps)

    def forward(self, batch: Batch, counts: Counts, weights: LossWeights, everything: bool = False) -> Output:
        """Loss of a micro-batch, divided by `counts`. `everything`: all noisy rows pass the head (evaluation)."""
        rows, segments, s = batch.rows, batch.segments, self.settings
        gated, trains_clean = s.mode == "gated", batch.clean_weight is not None
        clean_mask = self._clean_mask.update(clean_visibility(rows, s.context, batch.block))
        teacher_clean: Tensor | None = None
        if gated:
            with torch.no_grad():
                clean, context = self.run_clean(rows, self.decoder, self._none, clean_mask)
            teacher_clean = clean
        else:
            if weights.needs_teacher or trains_clean:
                with torch.no_grad():
                    causal = clean_mask
                    if self._teacher_mask is not self._clean_mask:
                        causal = self._teacher_mask.update(clean_visibility(rows, "token-causal", 1))
                    teacher_clean, _ = self.run_clean(rows, self.decoder, self._none, causal)
            clean, context = self.run_clean(rows, self._student, self._adapters, clean_mask)
        hidden = self.run_noisy(segments, context, self._noisy_mask.update(segments.visibility))

        chosen = None if everything else batch.chosen
        hidden = _choose(hidden.flatten(0, 1), chosen)
        weight, offset = (_choose(v.flatten(), chosen) for v in (segments.weight, segments.offset))
        line = torch.arange(s.rows, device=hidden.device)[:, None] * s.length
        target_at = _choose((line + segments.target).flatten(), chosen)
        tokens = rows.tokens.flatten()
        target, before = tokens[target_at], (target_at - 1).clamp(min=0)
        teacher = None
        if teacher_clean is not None and weights.needs_teacher:
            teacher = Teacher(teacher_clean.flatten(0, 1)[before], self.decoder.head)
        objective = Objective(target, weight / counts.noisy, teacher, weights)
        head = self._student.head
        loss, noisy = self._head_loss(hidden, head, objective)
        draft = None
        if s.draft_head:
            previous = F.embedding(tokens[before], self.decoder.embedding)
            drafted = self._draft(hidden, previous, self.tensors[DRAFT_INPUT], self.tensors[DRAFT_OUTPUT])
            more, draft = self._head_loss(drafted, head.detach(), objective)
            loss = loss + more
        clean_losses = None
        if batch.clean_weight is not None and teacher_clean is not None:
            following = rows.tokens.roll(-1, dims=1).flatten()
            frozen = Teacher(teacher_clean.flatten(0, 1), self.decoder.head)
            clean_share = batch.clean_weight.flatten() / counts.clean
            autoregressive = Objective(following, clean_share * s.ar, frozen, LossWeights(ce=0.0, kl=1.0))
            more, clean_losses = self._head_loss(clean.flatten(0, 1), head, autoregressive)
            loss = loss + more
        return Output(loss, noisy, draft, clean_losses, weight, offset)


def make_batch(
    settings: AdaptSettings,
    rows: Rows,
    segments: Segments,
    block: int,
    partial: bool,
    generator: torch.Generator,
) -> Batch:
    """Put a batch together; draws the rows that pass the head where settings.loss_share is below 1."""
    chosen = None
    if settings.loss_share < 1.0:
        total = segments.weight.numel()
        unit = min(settings.head_chunk, total)  # whole chunks: the head compiles once
        kept = max(1, round(total * settings.loss_share / unit)) * unit
        unwanted = (segments.weight.flatten() == 0).float()
        order = torch.rand(total, generator=generator, device=unwanted.device) + unwanted
        chosen = order.argsort()[:kept]
    clean_weight = None
    if settings.mode != "gated" and settings.ar > 0:
        clean_weight = clean_targets(rows, settings, block)
        if settings.context == "block-causal" and settings.shift == 0:
            clean_weight = None
    return Batch(rows, segments, block, partial, chosen, clean_weight)


def count_weights(batches: list[Batch], device: torch.device) -> Tensor:
    """Sums of the noisy and the clean weights, [2] float32."""
    noisy = [_choose(b.segments.weight.flatten(), b.chosen).sum() for b in batches]
    clean = [torch.zeros((), device=device) if b.clean_weight is None else b.clean_weight.sum() for b in batches]
    return torch.stack([torch.stack(noisy).sum(), torch.stack(clean).sum()])


def _choose(values: Tensor, chosen: Tensor | None) -> Tensor:
    return values if chosen is None else values[chosen]
