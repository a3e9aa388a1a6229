"""A projection of few rows as one Triton kernel: every processor reads an equal part of the weights.

The product is computed transposed, [features, inner] x [inner, tokens], so that the weights are the operand whose size
fills the matrix unit and few tokens waste nothing of it. Tiles of features are cut along `inner` into steps, and the
steps of all tiles, in order, are dealt out evenly to one program per processor ("stream-K", Osama et al. 2023, arXiv
2301.03598). A tile that several programs share is summed by the one that finishes it last, in the order of the
programs: the result depends on the shape of the weights alone, not on which program that is, nor on how many tokens
there are.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .overlap_triton import FETCH_BYTES, fetch, overlap


@dataclass(frozen=True)
class Config:
    """How the kernel is cut and compiled."""

    block_n: int  # features of a tile; of gated ones, those of gate and up together
    block_k: int  # inner dimension of a step
    per_processor: int  # programs of a processor
    num_warps: int
    num_stages: int


@triton.jit
def _owner(unit, programs, units):
    """The program whose share, [p * units // programs, (p + 1) * units // programs), holds `unit`."""
    return ((unit + 1) * programs - 1) // units


@triton.jit
def _finish(
    acc, gate, bias_ptr, out_ptr, feature, token, features, tokens, out_row, GATED: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Store a finished tile; acc, gate: [N, T] float32. With GATED, silu(gate) * acc, rounded as `silu_and_mul`."""
    mask = (feature < features)[:, None] & (token < tokens)[None, :]
    dtype = out_ptr.dtype.element_ty
    if BIAS:
        acc += tl.load(bias_ptr + feature, feature < features, other=0.0).to(tl.float32)[:, None]
    value = acc
    if GATED:
        rounded = gate.to(dtype).to(tl.float32)
        active = (rounded / (1.0 + tl.exp(-rounded))).to(dtype).to(tl.float32)
        value = active * acc.to(dtype).to(tl.float32)
    place = out_ptr + token[None, :].to(tl.int64) * out_row + feature[:, None]
    tl.store(place, value.to(dtype), mask)


@triton.jit(do_not_specialize=["tokens", "steps", "units"])
def _projection_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, tokens, features, inner, x_row, out_row, steps, units,
    GATED: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr = False, raw_ptr=None,
):  # fmt: skip
    """x: [tokens, inner]; weight: [features, inner], with GATED [2 * features, inner]; out: [tokens, features].

    part: [2 * programs, 1 + GATED, BLOCK_N, TOKENS] float32; count: [tiles] int32, zeros before and after.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    units = tl.cast(units, tl.int64)
    begin = (program * units // programs).to(tl.int32)
    end = ((program + 1) * units // programs).to(tl.int32)
    first_tile = begin // steps
    row = tl.arange(0, BLOCK_N)
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_K)
    if OVERLAP:
        source = raw_ptr if TMA else weight_ptr
        # Weights depend on nothing: the first ones are asked for while the kernel in front still runs.
        ahead = (first_tile * BLOCK_N + row).to(tl.int64) * inner + (begin - first_tile * steps) * BLOCK_K
        most = tl.cast(features, tl.int64) * inner * (1 + GATED) - FETCH_BYTES // 2
        fetch(source.to(tl.int64) + 2 * tl.minimum(ahead, most))
        if GATED:
            fetch(source.to(tl.int64) + 2 * tl.minimum(ahead + tl.cast(features, tl.int64) * inner, most))
        gdc_wait()
    if not TMA:
        x_at = x_ptr + token[:, None].to(tl.int64) * x_row + column[None, :]
    live = (token < tokens)[:, None]
    inside = row[:, None] * TOKENS + token[None, :]
    for tile in range(first_tile, (end + steps - 1) // steps):
        low = tl.cast(tile, tl.int64) * steps
        feature = tile * BLOCK_N + row
        # Rows past the end read the last one: their products are never stored.
        if not TMA:
            at = weight_ptr + tl.minimum(feature, features - 1)[:, None].to(tl.int64) * inner + column[None, :]
        acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
        gate = acc
        for step in range(tl.maximum(begin - tile * steps, 0), tl.minimum(end - tile * steps, steps)):
            if TMA:
                x = x_ptr.load([0, step * BLOCK_K])
                weight = weight_ptr.load([tile * BLOCK_N + GATED * features, step * BLOCK_K])
            else:
                x = tl.load(x_at + step * BLOCK_K, live, other=0.0)
                weight = tl.load(at + step * BLOCK_K + GATED * tl.cast(features, tl.int64) * inner)
            if WIDE:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
            if GATED:
                if TMA:
                    other = weight_ptr.load([tile * BLOCK_N, step * BLOCK_K])
                else:
                    other = tl.load(at + step * BLOCK_K)
                if WIDE:
                    other = other.to(tl.float32)
                gate = tl.dot(other, tl.trans(x), gate, input_precision="ieee")
        if OVERLAP and tile == (end - 1) // steps:
            gdc_launch_dependents()
        first = _owner(low, programs, units)
        last = _owner(low + steps - 1, programs, units)
        if first == last:
            _finish(acc, gate, bias_ptr, out_ptr, feature, token, features, tokens, out_row, GATED, BIAS)
        else:
            size = BLOCK_N * TOKENS
            mine = part_ptr + (2 * program + (tile != first_tile)) * (1 + GATED) * size + inside
            tl.store(mine, acc)
            if GATED:
                tl.store(mine + size, gate)
            tl.debug_barrier()  # all threads have stored before one of them says so
            if tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == last - first:
                acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
                gate = acc
                for sharer in range(first, last + 1):
                    # Of its two places, it used the second if the tile was not its first.
                    second = sharer * units // programs // steps != tile
                    theirs = part_ptr + (2 * sharer + second) * (1 + GATED) * size + inside
                    acc += tl.load(theirs, cache_modifier=".cg")
                    if GATED:
                        gate += tl.load(theirs + size, cache_modifier=".cg")
                _finish(acc, gate, bias_ptr, out_ptr, feature, token, features, tokens, out_row, GATED, BIAS)
                tl.store(count_ptr + tile, 0)


class Workspace:
    """What programs that share a tile leave for each other; one per device, made before any graph is captured."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(4096, dtype=torch.int32, device=device)


_workspaces: dict[torch.device, Workspace] = {}


def workspace(device: torch.device) -> Workspace:
    if device not in _workspaces:
        _workspaces[device] = Workspace(device)
    return _workspaces[device]


def choose_config(features: int, inner: int) -> Config:
    """From the shape of the weights alone, so that a row's sums are cut in one way however many rows there are."""
    return Config(128, 128 if inner % 128 == 0 else 64, 1, 8, 4)


def triton_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool = False,
    config: Config | None = None,
    processors: int | None = None,
    tma: bool = False,
    **launch: bool,
) -> Tensor:
    """`projection.project`. processors: how many programs' worth of parts the weights are cut into."""
    tokens, inner = x.shape
    features = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((tokens, features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    config = config or choose_config(features, inner)
    processors = processors or _processors(x.device)
    launch = launch or overlap(x.device)
    block_n = config.block_n // (2 if gated else 1)
    padded = max(16, triton.next_power_of_2(tokens))
    steps, tiles = inner // config.block_k, triton.cdiv(features, block_n)
    programs = min(processors * config.per_processor, tiles * steps)
    part = torch.empty(2 * programs * config.block_n * padded, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    raw = weight
    one = x
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        weight = TensorDescriptor.from_tensor(weight, [block_n, config.block_k])
        x = TensorDescriptor.from_tensor(x, [padded, config.block_k])
    _projection_kernel[(programs,)](
        x, weight, one if bias is None else bias, out, part, workspace(one.device).counts,
        tokens, features, inner, one.stride(0), out.stride(0), steps, tiles * steps,
        GATED=gated, BIAS=bias is not None, TOKENS=padded, BLOCK_N=block_n, BLOCK_K=config.block_k,
        WIDE=triton.knobs.runtime.interpret,  # the interpreter's bfloat16 products are wrong
        num_warps=config.num_warps, num_stages=config.num_stages, TMA=tma, raw_ptr=raw, **launch,
    )  # fmt: skip
    return out


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
