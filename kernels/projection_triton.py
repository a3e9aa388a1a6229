"""A product of few rows as one Triton kernel: a program per 64 features.

The product is computed transposed, [features, inner] x [inner, tokens], so that the weights are the operand whose size
fills the matrix unit and few tokens waste nothing of it. A program sums its features alone: tiles that several programs
share ("stream-K", Osama et al. 2023) lost more in the joining than they won by an even share.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_triton import follow, overlap

_FEATURES = 64


@triton.jit(do_not_specialize=["tokens"])
def _projection_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, features, inner, x_row,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (features / BLOCK_N). x: [tokens, inner]; weight: [features, inner]; out: [tokens, features]."""
    follow(OVERLAP)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None].to(tl.int64) * x_row + column[None, :]
    live = (token < tokens)[:, None]
    # Features past the end read the last one: their products are never stored.
    at = weight_ptr + tl.minimum(feature, features - 1)[:, None].to(tl.int64) * inner + column[None, :]
    acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for step in range(0, inner, BLOCK_K):
        x = tl.load(x_at + step, live, other=0.0)
        weight = tl.load(at + step)
        if WIDE:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + feature, feature < features, other=0.0).to(tl.float32)[:, None]
    place = out_ptr + token[None, :].to(tl.int64) * features + feature[:, None]
    mask = (feature < features)[:, None] & (token < tokens)[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask)


def triton_projection(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`projection.project`."""
    tokens, inner = x.shape
    features = weight.shape[0]
    if inner % 128:
        raise ValueError(f"the Triton kernel takes multiples of 128, not an inner size of {inner}")
    out = torch.empty((tokens, features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    programs = triton.cdiv(features, _FEATURES)
    # Many programs share a processor, which hides their starts; one that is alone has to have more in flight, for
    # which float32 leaves no room.
    shared = programs > 256 or inner % 256 or x.element_size() > 2
    block_k, num_stages = (128, 3) if shared else (256, 4)
    _projection_kernel[(programs,)](
        x, weight, x if bias is None else bias, out, tokens, features, inner, x.stride(0),
        BIAS=bias is not None, TOKENS=max(16, triton.next_power_of_2(tokens)), BLOCK_N=_FEATURES, BLOCK_K=block_k,
        WIDE=triton.knobs.runtime.interpret,  # the interpreter's bfloat16 products are wrong
        num_warps=4, num_stages=num_stages, **overlap(x.device, tokens),
    )  # fmt: skip
    return out
