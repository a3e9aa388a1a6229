"""Arithmetic of a training step, for model FLOP utilisation."""

from __future__ import annotations

from .adapter import projection_sizes
from .backbone import DecoderWeights, count_layer_weights
from .settings import AdaptSettings


def batch_flops(settings: AdaptSettings, decoder: DecoderWeights) -> float:
    """Useful operations of one micro-batch's projections and head, without attention's.

    A multiply and an add count as two. A frozen matrix costs a forward and the gradient of its input; a trained one
    also its own gradient. What is recomputed does not count, and padding rows count as rows.
    """
    s, b = settings, decoder.backbone
    clean_rows, noisy_rows = s.rows * s.length, s.rows * s.noisy_rows
    weights = 2.0 * count_layer_weights(decoder)
    adapter = 2.0 * b.layers * s.rank * sum(o + i for o, i in projection_sizes(b).values())
    head = 2.0 * b.vocab * b.hidden
    full = s.mode == "full"
    trained = 3 * weights if full else 2 * weights + 3 * adapter
    noisy = noisy_rows * trained
    clean = clean_rows * (weights if s.mode == "gated" else trained)
    has_ar = s.mode != "gated" and s.ar > 0
    if s.mode != "gated" and (s.uses_teacher or has_ar):
        clean += clean_rows * weights
    rows = noisy_rows * s.loss_share
    heads = rows * head * ((3 if full else 2) + (1 if s.uses_teacher else 0))
    if s.draft_head:
        heads += rows * (head * (2 + (1 if s.uses_teacher else 0)) + 3 * 2.0 * 3 * b.hidden**2)
    if has_ar:
        heads += clean_rows * head * ((3 if full else 2) + 1)
    return noisy + clean + heads


def attention_flops(decoder: DecoderWeights, noisy_pairs: float, clean_pairs: float, gated: bool) -> float:
    """Operations of attention over visible (query, key) pairs; a backward costs twice its forward."""
    b = decoder.backbone
    forward = 4.0 * b.heads * b.head_dim * b.layers
    return forward * (3 * noisy_pairs + (1 if gated else 3) * clean_pairs)
