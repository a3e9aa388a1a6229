"""The noise of `philox` inside Triton kernels: the same words, the same float32 to within its last bits."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .sizes import ceil_div

_ROUNDS = tl.constexpr(philox.ROUNDS)
_LARGEST = tl.constexpr(philox.LARGEST_BELOW_ONE)


@triton.jit
def noise_words(seed, choice, position, step, quad):
    """The words of the ids 4 * quad + (0, 1, 2, 3), interleaved: quad [N] int32 -> [4 * N] uint32."""
    w0, w1, w2, w3 = tl.philox(seed, quad, position.to(tl.int32), step.to(tl.int32), choice.to(tl.int32), _ROUNDS)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel(words):
    """`philox.gumbel_from_words`; a series stands in for log1p where 1 - v would lose digits."""
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST)
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * 0.2))))
    return -tl.log(tl.where(v < 0.015625, series, -tl.log(1.0 - v)))


@triton.jit
def _noise_kernel(
    seed_ptr, choice_ptr, position_ptr, step_ptr, out_ptr, first_quad, lead, vocab, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    quad = first_quad + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    seed = tl.load(seed_ptr + row)
    choice, position, step = tl.load(choice_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)
    noise = gumbel(noise_words(seed, choice, position, step, quad))
    column = block * BLOCK + tl.arange(0, BLOCK) - lead
    tl.store(out_ptr + row * vocab + column, noise, (column >= 0) & (column < vocab))


def triton_gumbel_noise(
    seed: Tensor, choice: Tensor, position: Tensor, step: Tensor, vocab_start: int, vocab: int
) -> Tensor:
    """`philox.gumbel_noise`."""
    out = torch.empty((seed.shape[0], vocab), dtype=torch.float32, device=seed.device)
    lead = vocab_start % 4
    if out.numel() > 0:
        grid = (seed.shape[0], ceil_div(lead + vocab, 1024))
        _noise_kernel[grid](seed, choice, position, step, out, vocab_start // 4, lead, vocab, BLOCK=1024)
    return out
