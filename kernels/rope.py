"""Rotary position embedding and the cache write: one launch before each layer's attention.

RoPE position and cache slot are separate inputs: draft branches and re-ordered windows keep their logical positions
wherever their slots lie. Convention: Llama's rotate-half (Su et al. 2021, in the layout of the Hugging Face models).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import Backend
from .norm import rms_norm
from .rope_native import native_rope_and_cache_write, rope_is_native


@dataclass(frozen=True)
class HeadNorm:
    """An RMSNorm of each head's query and key (Qwen3), by weights [head_dim]; eps, fused: as of `rms_norm`."""

    query: Tensor
    key: Tensor
    eps: float
    fused: bool


def rope_table(
    positions_max: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    rotary_dim: int | None = None,
    scaling: dict[str, Any] | None = None,
) -> Tensor:
    """Return [positions_max, rotary_dim]: cosines in the first half of the columns, sines in the second.

    Computed in float32 and rounded once to `dtype`, as the models do. `rotary_dim` (default head_dim) is how many
    leading dimensions of a head rotate. `scaling` is a checkpoint's `rope_scaling`: types "default", "linear", "llama3"
    and "yarn" (Peng et al. 2023, section 3.4). Raises ValueError for any other type.
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 != 0 or rotary_dim > head_dim:
        raise ValueError(f"rotary_dim {rotary_dim} must be even and at most head_dim {head_dim}")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).to(torch.float32) / rotary_dim
    frequencies, factor = _scale_frequencies(1.0 / theta**exponents, theta, rotary_dim, scaling or {})
    positions = torch.arange(positions_max, dtype=torch.float32, device=device)
    angles = positions[:, None] * frequencies
    return (torch.cat([angles.cos(), angles.sin()], dim=1) * factor).to(dtype)


def _scale_frequencies(
    frequencies: Tensor, theta: float, rotary_dim: int, scaling: dict[str, Any]
) -> tuple[Tensor, float]:
    """The scaled frequencies [rotary_dim / 2] and the factor on cosines and sines."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / float(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, theta, rotary_dim, scaling)
    raise ValueError(f"rope_scaling of type {kind!r} is not supported")


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / factor + kept * frequencies


def _yarn(frequencies: Tensor, theta: float, rotary_dim: int, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    factor = float(scaling["factor"])
    original = float(scaling["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        """The dimension whose wave turns that many times over the original context."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(scaling.get("beta_fast") or 32.0))
    high = dimension(float(scaling.get("beta_slow") or 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    index = torch.arange(rotary_dim // 2, dtype=torch.float32, device=frequencies.device)
    stretched = ((index - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    scaled = frequencies / factor * stretched + frequencies * (1.0 - stretched)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = float(scaling.get("mscale") or 0.0), float(scaling.get("mscale_all_dim") or 0.0)
        attention = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
    return scaled, float(attention)


def rope_and_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    norm: HeadNorm | None = None,
    backend: Backend = "torch",
) -> Tensor:
    """Normalise and rotate q and k, write k and v into the cache, return the rotated q.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim]; all three may be strided views of one fused
    projection. table: [positions, rotary_dim] from `rope_table`. positions, slots: [tokens] int32 or int64; slot = page
    * page_size + offset, each at most once except in a reserved padding page. k_cache, v_cache: [pages, page_size,
    kv_heads, head_dim] of q's dtype, written in place. Returns [tokens, heads, head_dim], contiguous.

    The arithmetic is Hugging Face's, rounding to the table's dtype after every product and sum: x * cos +
    rotate_half(x) * sin. The table is of q's dtype, or of float32 for models that rotate in full precision (LLaDA).
    """
    if backend == "triton":
        from .rope_triton import triton_rope_and_cache_write

        return triton_rope_and_cache_write(q, k, v, table, positions, slots, k_cache, v_cache, norm)
    if norm is not None:
        q = rms_norm(q, norm.query, norm.eps, norm.fused, backend=backend)
        k = rms_norm(k, norm.key, norm.eps, norm.fused, backend=backend)
    if backend == "native" and rope_is_native(q, k, v, table, positions, slots, k_cache, v_cache):
        return native_rope_and_cache_write(q, k, v, table, positions, slots, k_cache, v_cache)
    half = table.shape[1] // 2
    cos, sin = table.index_select(0, positions).unsqueeze(1).split(half, dim=-1)  # [tokens, 1, rotary_dim / 2]
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    slots = slots.long()
    flat = (-1, *k_cache.shape[2:])
    k_cache.view(flat).index_copy_(0, slots, _rotate(k.to(table.dtype), cos, sin).to(k.dtype))
    v_cache.view(flat).index_copy_(0, slots, v)
    return _rotate(q.to(table.dtype), cos, sin).to(q.dtype)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin over the leading dimensions of each head; contiguous.

    Rolling by half and putting the sign into the sines gives the same numbers as rotate_half in half the operators.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat([_rotate(x[..., :rotary_dim], cos, signed_sin), x[..., rotary_dim:]], dim=-1)
    return (x * cos).add_(x.roll(rotary_dim // 2, -1).mul_(signed_sin)).contiguous()
